"""Make the committed greedy continuations of SmolLM2-135M-Instruct with transformers' torch model.

`margins` are the logits by which the chosen tokens lead the second best: a continuation can only be that of
another program if its rounding errors are smaller.
"""

import json
from pathlib import Path

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The film was slow at first, but its last half hour is among the best of 1994; I",
)
NEW_TOKENS = 32


def main() -> None:
    """Write `generation.json` beside this file."""
    import torch
    from make_reference import FOLDER, torch_model

    from bnlora.data.assets import fetch_smollm2
    from bnlora.models.loading import read_checkpoint

    checkpoint = read_checkpoint(fetch_smollm2())
    model, rows = torch_model(checkpoint.config, dict(checkpoint.tensors)), []
    for prompt in PROMPTS:
        ids = torch.tensor([checkpoint.tokenizer(prompt).input_ids])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            eos_token_id=checkpoint.tokenizer.eos_token_id, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.stack(found.logits)[:, 0].topk(2).values
        tokens = found.sequences[0, ids.shape[1] :].tolist()
        rows.append({"prompt": prompt, "tokens": tokens, "margin": float((best[:, 0] - best[:, 1]).min())})
        print(prompt, "->", checkpoint.tokenizer.decode(tokens))
    path = Path(FOLDER) / "generation.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
