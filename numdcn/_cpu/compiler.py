"""Numba's compiler, made faster for kernels of many parts. The code it makes is the same.

Helpers are inlined before types are known. Numba prepares a helper anew for each call of it, and copies all that is in it
for each of its basic blocks, twice. Here a helper is prepared once, and only its statements are copied.

Numba also assembles every part that a kernel is made of on its own, then again as a part of each caller. Here only the
whole kernel is assembled.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from numba.core import ir
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.inline_closurecall import InlineWorker
from numba.core.untyped_passes import InlineInlinables

_prepared: dict[Callable[..., Any], Any] = {}  # the IR of a helper, ready to be inlined, with the globals of that time


class _Scope(ir.Scope):  # type: ignore[misc]
    """The names of a function. A copy has the same variables, of which inlining reads names and places in the source."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Scope:
        memo[id(self)] = new = copy.copy(self)
        new.localvars = ir.VarMap()
        new.localvars._con = dict(self.localvars._con)
        new.redefined = self.redefined.copy()
        new.var_redefinitions = defaultdict(set, {k: v.copy() for k, v in self.var_redefinitions.items()})
        return new


def _copied(statement: Any) -> Any:
    """A copy of a statement. Inlining changes a statement, its expression and perhaps lists in that; it replaces all
    else."""
    new = copy.copy(statement)
    expression = getattr(new, "value", None)
    if isinstance(expression, ir.Expr):
        new.value = expression = copy.copy(expression)
        expression._kws = {k: v.copy() if isinstance(v, list) else v for k, v in expression._kws.items()}
    return new


class _Block(ir.Block):  # type: ignore[misc]
    """A basic block of a prepared helper. Copies share names, constants and places in the source."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Block:
        new = copy.copy(self)
        new.scope, new.body = copy.deepcopy(self.scope, memo), [_copied(statement) for statement in self.body]
        return new


class _Worker(InlineWorker):  # type: ignore[misc]
    """Inlines helpers that are prepared once. Whoever inlines copies what was prepared."""

    def run_untyped_passes(self, function: Callable[..., Any]) -> Any:
        found = _prepared.get(function)
        if found is None:
            self._compiler_pipeline = lambda state: _inlining(DefaultPassBuilder.define_untyped_pipeline(state))
            found = super().run_untyped_passes(function)
            for block in found.blocks.values():
                block.scope.__class__ = _Scope  # the scope that its variables refer to as well
                block.__class__ = _Block
            _prepared[function] = found
        self.flags.enable_ssa = False  # as Numba's
        return found


@register_pass(mutates_CFG=True, analysis_only=False)
class _InlineHelpers(InlineInlinables):  # type: ignore[misc]
    _name = "inline_helpers"

    def _do_work(self, state: Any, work_list: Any, block: Any, i: int, expr: Any, inline_worker: Any) -> Any:
        inline_worker.__class__ = _Worker
        return super()._do_work(state, work_list, block, i, expr, inline_worker)


def _inlining(manager: PassManager) -> PassManager:
    """Passes, with `_InlineHelpers` in place of Numba's."""
    manager.passes = [(_InlineHelpers if p is InlineInlinables else p, text) for p, text in manager.passes]
    manager.finalize()
    return manager


class KernelCompiler(CompilerBase):  # type: ignore[misc]
    """The compiler of what is called from outside."""

    def define_pipelines(self) -> list[PassManager]:
        return [_inlining(DefaultPassBuilder.define_nopython_pipeline(self.state))]


class _Part(JITCodeLibrary):  # type: ignore[misc]
    """Code that is optimised, then waits for the kernel it becomes a part of."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, env: Any) -> None:
        """Kernels raise no exceptions and keep no Python objects, so they have no use for an environment."""


class BlockCompiler(KernelCompiler):
    """The compiler of what is called from kernels alone."""

    def define_pipelines(self) -> list[PassManager]:
        self.state.library = _Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()
