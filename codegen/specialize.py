"""One layer's kernels as one module of text: what is printed is what runs.

A module begins at its host function. Every kernel that it launches, and every function that those call, is
folded with what is known where it is called (`emit.fold`), and written once for each text that this gives.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsmoe_compiler.codegen import emit
from dsmoe_compiler.codegen.emit import Constants
from dsmoe_compiler.codegen.library import Source, module, source
from dsmoe_compiler.codegen.pointwise import Function


@dataclass(frozen=True)
class Root:
    """A kernel as the host launches it: where its text is, what is known of it, its launch options, the
    functions generated for it in place of the library's, and the tensors that `vectors` stands for, by
    parameter: each a name in the kernel and an expression in the host function.
    """

    module: str
    name: str
    constants: Constants
    options: Mapping[str, int] = field(default_factory=dict)
    generated: Mapping[str, Function] = field(default_factory=dict)
    vectors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A function as it was written: the name it got, and what became of each of its parameters."""

    name: str
    parameters: Mapping[str, Sequence[str]]


def module_text(doc: str, host: Source, constants: Constants, roots: Mapping[str, Root]) -> str:
    """The module's text. `roots` are the kernels by the names that the host function launches them under, and
    `constants` what is known in the host function itself.
    """
    writer = _Writer(roots)
    writer.host(host, constants, "layer")
    hosts = writer.hosts.values()
    imports = ["import torch", "import triton", "import triton.language as tl"]
    if any("TensorDescriptor" in text for text in hosts):
        imports.append("from triton.tools.tensor_descriptor import TensorDescriptor")
    head = f'"""{doc}"""\n\n' + "\n".join(imports) + "\n"
    if "counters" in writer.hosts:
        head += "\n_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}\n"
    return "\n\n".join([head, *(_tidy(f) for f in (*writer.texts.values(), *hosts))])


def _tidy(text: str) -> str:
    """A function's text without the blank lines that a branch left behind, nor the breaks of lines that fit
    where the branch around them is gone.
    """
    return re.sub(r"\n{3,}", "\n\n", _BROKEN.sub(_joined, text)).rstrip() + "\n"


# A bracket that opens at the end of a line, its whole content in the next, and that closes in the third. (A
# trailing comma would keep the lines apart.)
_BROKEN = re.compile(r"^( *)(\S.*[(\[])\n\1    (\S[^#\n]*[^#,\n])\n\1([)\]].*)$", re.MULTILINE)


def _joined(broken: re.Match[str]) -> str:
    line = "".join(broken.groups())
    return line if len(line) <= emit.LINE else broken[0]


class _Writer:
    """The functions written so far, callees before callers."""

    def __init__(self, roots: Mapping[str, Root]) -> None:
        self.roots = roots
        self.texts = dict[str, str]()
        self.hosts = dict[str, str]()

    def host(self, found: Source, constants: Constants, wanted: str) -> Written:
        """A host function, its launches with what their kernels take beside tensors, and the host functions
        that it calls.
        """
        text = emit.substitute(emit.fold(found.text, constants), constants)
        text = re.sub(r"triton\.cdiv\((\w+), 1\)", r"\1", text)

        def call_of(text: str, call: ast.Call) -> tuple[str, list[str]] | None:
            name = emit.called(call)
            if name is None:
                return None
            if name in self.roots:
                return self._launch(name, _given(text, call, _kernel(self.roots[name])))
            if name not in module(found.module):
                return None
            callee = source(found.module, name)
            given, kept = _given(text, call, callee), self.host(callee, constants, name)
            return kept.name, [given[p] for p, names in kept.parameters.items() if names]

        text, parameters = _pruned(emit.with_calls(text, call_of))
        self.hosts[wanted] = emit.renamed(text, wanted)
        return Written(wanted, parameters)

    def _launch(self, name: str, given: Mapping[str, str]) -> tuple[str, list[str]]:
        """The kernel launched under a name, and the arguments of its launch."""
        root = self.roots[name]
        kernel = self.function(_kernel(root), root.constants, root, name)
        arguments = list[str]()
        for parameter, kept in kernel.parameters.items():
            if parameter in root.vectors:
                arguments += [f"{n}={root.vectors[parameter][n]}" for n in kept]
            elif kept:
                value = given.get(parameter) or emit.literal(root.constants[parameter])
                arguments.append(f"{parameter}={value}")
        return kernel.name, [*arguments, *(f"{k}={v}" for k, v in root.options.items())]

    def function(self, found: Source, constants: Constants, root: Root, wanted: str) -> Written:
        """A function of the library folded with what is known of its parameters, and all that it calls."""
        text = emit.fold(found.text, constants)

        def call_of(text: str, call: ast.Call) -> tuple[str, list[str]] | None:
            name = emit.called(call)
            if name is None or name not in found.seen:
                return None
            where, what = found.seen[name]
            callee = source(where, what)
            given = _given(text, call, callee)
            if name in root.generated:
                made = root.generated[name]
                self._library(made)
                written = self._add(made.name, made.source)
                return written, [given.get(p, p) for p in (q.name for q in emit.parameters(made.source))]
            known = {p: v for p, a in given.items() if (v := emit.value(a, constants)) is not emit.UNKNOWN}
            kept = self.function(callee, known, root, what)
            return kept.name, [given[p] for p, names in kept.parameters.items() if names]

        text = emit.without_unread(emit.with_calls(text, call_of))
        expand = {p: tuple(names) for p, names in root.vectors.items()}
        text, parameters = _pruned(text, expand)
        return Written(self._add(wanted, text), parameters)

    def _library(self, made: Function) -> None:
        """The functions of one number that a generated function calls."""
        for name in made.calls:
            self.function(source("functions", name), {}, Root("functions", name, {}), name)

    def _add(self, name: str, text: str) -> str:
        """The name that a function's text has in the module."""
        number = 1
        while True:
            candidate = name if number == 1 else f"{name}_{number}"
            text = emit.renamed(text, candidate)
            if self.texts.setdefault(candidate, text) == text:
                return candidate
            number += 1


def _kernel(root: Root) -> Source:
    return source(root.module, root.name)


def _given(text: str, call: ast.Call, callee: Source) -> dict[str, str]:
    """The text of each argument of a call, by the callee's parameter."""
    given = {p: emit.segment(text, a) for p, a in zip(callee.parameters, call.args, strict=False)}
    return given | {k.arg: emit.segment(text, k.value) for k in call.keywords if k.arg}


def _pruned(
    text: str, expand: Mapping[str, Sequence[str]] | None = None
) -> tuple[str, dict[str, Sequence[str]]]:
    """A function's text without the parameters that nothing reads, and what became of each."""
    read = emit.read_names(text)
    parameters = dict[str, Sequence[str]]()
    for p in emit.parameters(text):
        if expand is not None and p.name in expand:
            parameters[p.name] = [n for n in expand[p.name] if n in read]
        else:
            parameters[p.name] = [p.name] if p.name in read else []
    return emit.with_parameters(text, parameters), parameters
