"""Instructions as Python source: a function for each block, with as little between two segments as can be.

Such a function takes its inputs in a list and empties it, as the programs of inductor do.
"""

import itertools
import linecache
from collections.abc import Iterable
from typing import Any

from dyncompile.lowering.instructions import Call, Code, Drop, Gather, Merge, Program, Share, Split
from dyncompile.lowering.runtime import choice, gather, is_compiled, merge, within

_names = itertools.count()


def python_source(code: Code) -> str:
    """The source of the function that carries out instructions, behind that of those that it calls."""
    writer = _Writer()
    writer.function(code)
    return writer.source


def python_program(code: Code) -> Program:
    """The function that carries out instructions."""
    writer = _Writer()
    root = writer.function(code)
    source = writer.source
    name = f"<dyncompile program {next(_names)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), writer.bound)  # noqa: S102 - written here
    program: Program = writer.bound[root]
    return program


class _Writer:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bound: dict[str, Any] = {"choice": choice, "gather": gather, "merge": merge, "within": within}
        self.count = itertools.count()

    @property
    def source(self) -> str:
        """What was written."""
        return "\n".join(self.lines)

    def function(self, code: Code) -> str:
        """Write a block's function, behind those that it calls; its name."""
        lines = [f"{_tuple(range(code.inputs))} = values"] if code.inputs else []
        lines += ["values.clear()", f"run.rows[{code.name!r}] = run.rows.get({code.name!r}, 0) + count"]
        for step in code.steps:
            match step:
                case Call():
                    lines += self.call(step)
                case Share():
                    lines += self.share(step)
                case Drop():
                    lines += _drop(step.registers)
                case Split():
                    lines += self.split(step)
        name = self.name("block")
        lines.append(f"return {_tuple(code.outputs)}")
        self.lines += [f"def {name}(values, count, index, run):", *_indented(lines)]
        return name

    def name(self, kind: str) -> str:
        return f"{kind}{next(self.count)}"

    def bind(self, kind: str, value: object) -> str:
        """A global of the program."""
        name = self.name(kind)
        self.bound[name] = value
        return name

    def call(self, step: Call) -> list[str]:
        arguments = []
        for given in step.arguments:
            word = f"v{given.register}"
            if given.layout is not None:
                how = "clone" if given.copied else "contiguous"
                word += f".{how}(memory_format={self.bind('layout', given.layout)})"
            arguments.append(word)
        if is_compiled(step.segment):
            serving, serve = self.bind("programs", step.segment.serving), self.bind("serve", step.segment.serve)
            arguments.insert(0, "count")
            run = f"({serving}.get(count) or {serve}(count))(a)"
        else:
            run = f"{self.bind('segment', step.segment)}(*a)"
        return [f"a = [{', '.join(arguments)}]", *_drop(step.dead), f"{_tuple(step.results)} = {run}"]

    def share(self, step: Share) -> list[str]:
        value, where = f"v{step.decision}", f"within(index, {step.finer})"
        return [
            "if run.override is not None:",
            f" {value} = run.override({step.name!r}, {value}, {where}, run.batch * {step.rows})",
            *([] if step.real is None else [f" {value} = {value} & v{step.real}"]),
            f"run.rows[{step.name!r}] = int({value}.count_nonzero())",
        ]

    def split(self, step: Split) -> list[str]:
        functions = [self.function(arm.code) if arm.code else None for arm in step.arms]
        where = "index" if step.finer == 1 else f"within(index, {step.finer})"
        wanted = tuple(arm.wanted for arm in step.arms)
        lines = [
            f"d = v{step.decision}",
            "if run.override is not None:",
            f" d = run.override({step.name!r}, d, {where}, run.batch * {step.rows})",
            "n = count" if step.finer == 1 else f"n = count * {step.finer}",
            f"arm, rows = (int(d.item()), ()) if n == 1 else choice(d, {len(step.arms)}, {wanted})",
            "d = None",
        ]
        for i, function in enumerate(functions):
            lines += [f"{'if' if i == 0 else 'elif'} arm == {i}:", *_indented(_whole(step, i, function, where))]
        return [*lines, "else:", *_indented(_mixed(step, functions, where))]


def _whole(step: Split, index: int, function: str | None, where: str) -> list[str]:
    """Every row takes one arm: run it on the values themselves, copy nothing."""
    arm = step.arms[index]
    lines = [f"v{to} = v{of}" for to, of in arm.moved]
    if function is None:
        return [*lines, *_drop(step.dead)] or ["pass"]
    given = [f"v{of}.clone()" if copied else f"v{of}" for of, copied in arm.given]
    return [
        *lines,
        f"a = [{', '.join(given)}]",
        *_drop(step.dead),
        f"r = {function}(a, n, {where}, run)",
        *(f"v{to} = r[{i}]" for to, i in arm.results),
        "a = r = None",
    ]


def _mixed(step: Split, functions: list[str | None], where: str) -> list[str]:
    """Rows differ: gather those of each arm, run it, and put the results together."""
    lines = []
    rows = "run.padded(rows[{0}])" if step.rows == 1 else "rows[{0}]"
    for i, arm in enumerate(step.arms):
        if arm.code:
            gathered = ", ".join(_gather(g, f"i{i}") for g in arm.gathered)
            lines += [f"i{i} = {rows.format(i)}", f"c{i} = i{i}.shape[0]", f"a{i} = [{gathered}] if c{i} else None"]
    lines += _drop(step.ungathered)
    for i, function in enumerate(functions):
        if function:
            inner = f"i{i} if {where} is None or run.override is None else ({where})[i{i}]"
            lines.append(f"r{i} = {function}(a{i}, c{i}, {inner}, run) if c{i} else None")
    for merged in step.merged:
        lines += _merge(merged)
    lines += [*_drop(step.dead), "p = r = a = rows = None"]
    return lines + [f"i{i} = a{i} = r{i} = None" for i, function in enumerate(functions) if function]


def _merge(step: Merge) -> list[str]:
    parts = []
    for part in step.parts:
        j = part.arm
        if part.rows is None:
            parts.append(f"(rows[{j}], r{j}[{part.result}]) if c{j} else None")
        else:
            parts.append(f"(rows[{j}], {_gather(part.rows, f'rows[{j}]')})")
    start = "None" if step.base is None else f"v{step.base}.clone()" if step.copied else f"v{step.base}"
    return [
        f"p = [q for q in [{', '.join(parts)}] if q]",
        f"v{step.target} = merge({start}, p, {step.dim}, {step.entries}, n)",
    ]


def _gather(step: Gather, index: str) -> str:
    return f"gather(v{step.register}, {index}, {step.dim}, {step.entries})"


def _drop(registers: Iterable[int]) -> list[str]:
    names = [f"v{register}" for register in registers]
    return [f"{' = '.join(names)} = None"] if names else []


def _tuple(registers: Iterable[int]) -> str:
    return f"({''.join(f'v{register}, ' for register in registers).rstrip(' ')})"


def _indented(lines: Iterable[str]) -> list[str]:
    return [f" {line}" for line in lines]
