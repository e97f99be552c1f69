"""Argo CD's Lua, without Argo CD: Lua 5.1 with the base and table libraries, an object as the global
``obj``, and what a script returns.

As in Argo CD, an empty table comes back as what it was before: Lua does not know whether it is a
list (https://github.com/argoproj/argo-cd/blob/v3.2.1/util/lua/lua.go).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lupa import lua51

_WITHHELD = ("string", "math", "io", "debug", "coroutine", "os", "python", "require", "package")


def run(script: str, body: Mapping[str, Any], parameters: Mapping[str, str] | None = None) -> Any:
    """What the script returns, as Python data. Raises `lupa.LuaError` for what fails in it."""
    lua = lua51.LuaRuntime(unpack_returned_tuples=True, register_eval=False)
    lua.execute('getmetatable("").__index = nil')  # methods of strings come with the library
    for name in _WITHHELD:
        lua.globals()[name] = None
    lua.globals()["obj"] = _to_lua(lua, body)
    lua.globals()["actionParams"] = _to_lua(lua, parameters or {})
    return _from_lua(lua.execute(script), body)


def _to_lua(lua: Any, value: Any) -> Any:
    match value:
        case Mapping():
            return lua.table_from({key: _to_lua(lua, item) for key, item in value.items()})
        case list():
            return lua.table_from([_to_lua(lua, item) for item in value])
        case _:
            return value


def _from_lua(value: Any, before: Any) -> Any:
    if lua51.lua_type(value) != "table":
        return value
    keys = list(value)
    if not keys:
        return [] if isinstance(before, list) else {}
    if keys == list(range(1, len(keys) + 1)):
        items = before if isinstance(before, list) else []
        items = [*items, *[None] * (len(keys) - len(items))]
        return [_from_lua(value[key], items[key - 1]) for key in keys]
    fields = before if isinstance(before, Mapping) else {}
    return {key: _from_lua(value[key], fields.get(key)) for key in keys}
