"""`tokenmill schema export`: what travels on the wire, described for other languages. Made from the structs."""

from pathlib import Path
from typing import Any

import msgspec
from cyclopts import App

from schemas.export import asyncapi, json_schemas
from worker.commands.output import Json, print_json
from worker.config import Topics

app = App(name="schema", help="Export the JSON Schemas of everything on the wire, and an AsyncAPI document.")


@app.command
def export(folder: Path, /, *, topics: Topics = Topics(), json: Json = False) -> None:
    """Write one JSON Schema for each kind of message, named as its `ce_type` header, and asyncapi.json.

    For a schema registry, for other languages, or to check a request before it is sent:

        tokenmill schema export schemas.d
        check-jsonschema --schemafile schemas.d/tokenmill.request.v1.json request.json
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents: dict[str, Any] = {**json_schemas(), "asyncapi": asyncapi(topics.by_setting)}
    written = [_write(folder / f"{name}.json", document) for name, document in documents.items()]
    if json:
        print_json(written)
    else:
        print("\n".join(map(str, written)))


def _write(path: Path, document: dict[str, Any]) -> Path:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    return path
