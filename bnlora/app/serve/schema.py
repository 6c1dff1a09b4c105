"""The description of the routes in OpenAPI, which clients of other languages and fuzzers read."""

from collections.abc import Mapping
from typing import Any

from bnlora.app.serve.service import Service

Schema = dict[str, Any]

STATUSES = {
    400: "The connection was closed before the whole body came.",
    401: "No token, or another one.",
    403: "The host that the client names is not this machine.",
    404: "There is no such thing.",
    408: "The body came too slowly.",
    413: "More bytes, rows, characters or tokens than the limits allow.",
    415: "The body is not declared as application/json.",
    422: "The body is not what the route takes.",
    429: "Too many requests at a time.",
    503: "There is not enough memory or space, or the service stops.",
}
"""Meaning of each status other than 200."""

_BODY = (400, 408, 413, 415, 422, 503)
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}


def description(service: Service, *, has_token: bool) -> Schema:
    """The routes of a service, with its classes and its limits.

    Args:
        service: What answers.
        has_token: Whether clients must send a token.
    """
    given = (401,) if has_token else (403,)
    secured: Schema = {"security": [{"token": []}]} if has_token else {}

    def route(summary: str, answer: Schema, statuses: tuple[int, ...] = (), **more: Any) -> Schema:
        refusals = {str(status): _refusal(status) for status in sorted({*given, *statuses})}
        return {"summary": summary, "responses": {"200": answer} | refusals, **secured, **more}

    health = route("Whether the service answers", _json(_closed(status={"const": "ok"})))
    if has_token:  # a probe need not have it
        health = {**health, "security": [], "responses": {"200": health["responses"]["200"]}}
    predict = route("Predict texts", _json(_predictions(service)), (*_BODY, 429), **_takes(_texts(service)))
    labels = route("Take labels of predictions", _json(_scores()), (*_BODY, 404), **_takes(_labels(service)))
    routes: dict[str, Schema] = {
        "/predict": {"post": predict},
        "/labels": {"post": labels},
        "/monitor": {"get": route("Alarms of the monitor", _json(_monitor()), (404,))},
        "/health": {"get": health},
        "/metrics": {"get": route("Counts for Prometheus", _content("text/plain", _TEXT))},
        "/openapi.json": {"get": route("This description", _json(_OBJECT))},
        "/": {"get": route("A page for people", _content("text/html", _TEXT))},
    }
    schemes = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}} if has_token else {}
    about = {"title": f"bnlora: {service.name}", "version": "1"}
    return {"openapi": "3.1.0", "info": about, "paths": routes, "components": schemes}


def _texts(service: Service) -> Schema:
    limits = service.limits
    # What `str.strip` leaves nothing of is refused, and its spaces are more than those of `\s` everywhere.
    text = {**_TEXT, "pattern": "[^\\s\\x1c-\\x1f\\x85\\ufeff]", "maxLength": limits.max_characters}
    return _closed(texts={"type": "array", "items": text, "minItems": 1, "maxItems": limits.max_rows})


def _labels(service: Service) -> Schema:
    names = service.names
    number = {"type": "integer", "minimum": 0, "maximum": len(names) - 1}
    entry = _closed(id=_TEXT, label={"anyOf": [{"enum": names}, number]})
    return _closed(
        labels={"type": "array", "items": entry, "minItems": 1, "maxItems": service.limits.max_rows}
    )


def _predictions(service: Service) -> Schema:
    names = service.names
    share = {**_NUMBER, "minimum": 0, "maximum": 1}
    row = {
        "id": _TEXT,
        "prediction": {"enum": names},
        "probabilities": _closed(**dict.fromkeys(names, share)),
        **dict.fromkeys(("entropy", "epistemic", "aleatoric"), _NUMBER),
    }
    if service.rule is not None:
        row["set"] = {"type": "array", "items": {"enum": names}}
    if service.costs is not None:
        row |= {"action": {"enum": list(service.costs.actions)}, "expected cost": _NUMBER}
    rows = {"type": "array", "items": _closed(**row)}
    return _closed(kind={"enum": ["network", "tangent"]}, draws=_COUNT, rows=rows)


def _scores() -> Schema:
    return _closed(labelled=_COUNT, accuracy={**_NUMBER, "minimum": 0, "maximum": 1}, nll=_NUMBER)


def _monitor() -> Schema:
    maybe = {"type": ["number", "null"]}
    mean = _closed(value=maybe, low=maybe, high=maybe, fits={"type": "boolean"})
    alert = _closed(test=_TEXT, row=_COUNT, time=_TEXT, evidence=maybe)
    finding = _closed(
        name=_TEXT,
        status={"enum": ["problem", "caution", "fine", "not asked"]},
        sentence=_TEXT,
        number=maybe,
        threshold=maybe,
        remedy=_TEXT,
    )
    return _closed(
        rows=_COUNT,
        labelled=_COUNT,
        alpha=_NUMBER,
        floor=maybe,
        alerts={"type": "array", "items": alert},
        findings={"type": "array", "items": finding},
        means={"type": "object", "additionalProperties": mean},
        ece=maybe,
        recommendation=_TEXT,
    )


def _closed(**properties: Any) -> Schema:
    """An object with all of these entries and no other."""
    return {
        **_OBJECT,
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _content(kind: str, schema: Schema, text: str = "Answered.") -> Schema:
    return {"description": text, "content": {kind: {"schema": schema}}}


def _json(schema: Schema) -> Schema:
    return _content("application/json", schema)


def _takes(schema: Schema) -> Mapping[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _refusal(status: int) -> Schema:
    header = {401: "WWW-Authenticate", 429: "Retry-After"}.get(status)
    headers = {} if header is None else {"headers": {header: {"required": True, "schema": _TEXT}}}
    return _content("application/json", _closed(error=_TEXT), STATUSES[status]) | headers
