"""Calling a function once another library's module has been imported, without importing it here.

Registries fill when modules are imported, but importing Detectron2 only to register with it would
cost everybody seconds who wants the operator alone.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def when_imported(name: str, function: Callable[[], object]) -> None:
    """Calls a function right after a module is imported; at once if it has been already.

    Args:
        name: the module's full name. It need not be installed.
        function: takes nothing; what it raises comes out of the import.
    """
    if name in sys.modules:
        function()
    else:
        _FINDER.functions.setdefault(name, []).append(function)


class _Finder(MetaPathFinder):
    """Lets all other finders find a module, and adds the functions to what importing it runs."""

    def __init__(self):
        self.functions: dict[str, list[Callable[[], object]]] = {}
        self._searching: set[str] = set()

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.functions or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.remove(fullname)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_module_and_call(module) -> None:
            exec_module(module)
            for function in self.functions.pop(fullname, ()):
                function()

        spec.loader.exec_module = exec_module_and_call  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()
sys.meta_path.insert(0, _FINDER)
