"""Requests that wait, and the one thread that answers them, as many together as fit into a batch."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bnlora.app.serve.bodies import Refused
from bnlora.app.serve.log import PredictionLog
from bnlora.app.serve.service import Answer, Service


class _Waiting(NamedTuple):
    texts: list[str]
    result: "asyncio.Future[Answer]"


class Queue:
    """Requests in the order of their arrival.

    Args:
        service: What answers.
        log: Where predictions are appended, if anywhere.
    """

    def __init__(self, service: Service, log: PredictionLog | None):
        self._service, self._log = service, log
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bnlora-serve")

    async def ask(self, texts: list[str]) -> Answer:
        """The answer to the texts of a request, as soon as its turn comes.

        Raises:
            Refused: If the fit cannot read a text.
        """
        waiting = _Waiting(texts, asyncio.get_running_loop().create_future())
        await self._waiting.put(waiting)
        return await waiting.result

    async def run(self) -> None:
        """Answer requests until the task is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                group = await self._group()
                try:
                    answers = await loop.run_in_executor(self._thread, self._answers, group)
                except Exception as error:  # the requests get it, and the queue goes on
                    answers = [error] * len(group)
                for waiting, answer in zip(group, answers, strict=True):
                    _settle(waiting.result, answer)
        finally:
            self._thread.shutdown(wait=False)

    async def _group(self) -> list[_Waiting]:
        """The next request, and those behind it while there is room in a batch."""
        group = [await self._waiting.get()]
        room = self._service.limits.batch_rows - len(group[0].texts)
        while room > 0 and not self._waiting.empty():
            group.append(self._waiting.get_nowait())
            room -= len(group[-1].texts)
        return group

    def _answers(self, group: list[_Waiting]) -> list[Answer | Exception]:
        """The answers to some requests; each prediction is written to the log before it goes out."""
        answers: list[Answer | Exception] = [*self._service.answer([waiting.texts for waiting in group])]
        if self._log is None:
            return answers
        for index, waiting in enumerate(group):
            answer = answers[index]
            if isinstance(answer, Answer) and not waiting.result.done():  # it was given up otherwise
                try:
                    self._log.append(waiting.texts, answer.columns)
                except OSError:
                    answers[index] = Refused(503, "the prediction could not be written to the log")
        return answers


def _settle(result: "asyncio.Future[Answer]", answer: Answer | Exception) -> None:
    if result.done():  # the client has gone
        return
    if isinstance(answer, Exception):
        result.set_exception(answer)
    else:
        result.set_result(answer)
