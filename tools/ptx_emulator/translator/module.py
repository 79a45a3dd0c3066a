"""A PTX file: its kernels and variables, and its translation to C."""

import re
from typing import NamedTuple

from .arithmetic import Arithmetic
from .bits import Bits
from .memory import Memory
from .operands import Operands
from .syntax import Unsupported, c_name, kind_of, split, statements, without_comments
from .together import Together

GAP = 64  # bytes between shared arrays, not to be touched
LOCAL = 64 << 10  # bytes: half of a thread's stack, see STACK in driver/blocks.cpp
VARIABLE = re.compile(r"\.([busf]\d+|bf16)\s+([\w$%]+)\s*((?:\[\d*\])*)\s*")


class Shared(NamedTuple):
    """An array in the memory of a block, in bytes."""

    offset: int
    size: int


class Global(NamedTuple):
    """A variable of the module, in bytes."""

    size: int
    content: bytes


class Kernel(Arithmetic, Bits, Memory, Together, Operands):
    """An `.entry`; `code` receives a line of C for each of its statements."""

    def __init__(self, module, head):
        match = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*)$", head)
        super().__init__(module, dict(map(self._parameter, split(match[2]))))
        bounds = re.search(r"\.maxntid ([\d, ]+)", match[3])
        self.name, self.most_threads, self.depth = match[1], 1024, 0
        if bounds:
            x, y, z = [*map(int, bounds[1].split(",")), 1, 1][:3]
            self.most_threads = x * y * z

    @staticmethod
    def _parameter(text):
        """(name, bytes)"""
        match = re.search(r"\.(\w+)\s+([\w$]+)\s*(?:\[(\d+)\])?$", text)
        return match[2], kind_of(match[1])[1] // 8 * int(match[3] or 1)

    def take(self, text, line):
        """A statement, label or bracket. Returns whether the kernel continues."""
        if text in ("{", "}"):
            self.depth += 1 if text == "{" else -1
            self.code.append("{" if text == "{" else "; }")
            if text == "{":
                self.scopes.append({})
            else:
                self.scopes.pop()
            return self.depth > 0
        if text.endswith(":"):
            self.code.append(f"{c_name(text[:-1])}: ;")
        elif text.startswith(".reg"):
            self.declare(text[4:])
        elif text.startswith((".local", ".shared")):
            self.module.variable(text, self)
        elif text and not text.startswith(".pragma"):
            self.code.append(self.instruction(text, line))
        return True

    def instruction(self, text, line):
        """`@predicate name.words operands` as a statement of C."""
        guard, plain = "", text
        if match := re.match(r"@(!?)(%?[\w$]+)\s+", text):
            guard, plain = f"if ({match[1]}{self.read(match[2], 'p', 1)}) ", text[match.end() :]
        name, _, operands = plain.partition(" ")
        head, *words = name.split(".")
        translate = getattr(self, f"op_{head}", None)
        if translate is None:
            raise Unsupported(f"unknown instruction {name}")
        try:
            made = translate(words, split(operands), line)
        except (KeyError, IndexError, ValueError, TypeError, StopIteration) as error:  # unexpected operands
            raise Unsupported(f"unknown form of {name}: {type(error).__name__} {error}") from error
        return f"{guard}{{ {made} }}" if guard else made

    def c(self, number):
        self.declarations()
        sizes = ", ".join(map(str, [*self.parameters.values(), 0]))
        body = [line for line in self.code if line]
        return [
            f"static void kernel_{number}(Thread *t, void **params)", *body,
            f"static const u16 sizes_{number}[] = {{{sizes}}};",
        ]  # fmt: skip


class Module:
    """Parsed on construction; `c()` is the whole C file."""

    def __init__(self, text):
        self.shared, self.globals, self.kernels, self.shared_size = {}, {}, [], 0
        told = re.finditer(r"^// emulator: (\S+) registers (\d+)", text, re.MULTILINE)  # written by linker.py
        self.registers = {match[1]: int(match[2]) for match in told}
        kernel = None
        for part, line in statements(without_comments(text)):
            try:
                if kernel is not None:
                    kernel = kernel if kernel.take(part, line) else None
                elif ".entry" in part:
                    kernel = Kernel(self, part)
                    self.kernels.append(kernel)
                elif re.search(r"\.(shared|global|const)\b", part):
                    self.variable(part)
                elif part:
                    raise Unsupported("not emulated")
            except Unsupported as error:
                raise Unsupported(f"line {line}: {part[:200]}: {error}") from error

    def variable(self, text, kernel=None):
        """A declaration of memory; its state space decides where it goes."""
        space = re.search(r"\.(shared|global|const|local)\b", text)[1]
        head, _, values = text.partition("=")
        match = VARIABLE.search(head)
        if not match or ".extern" in text or "[]" in match[3]:
            raise Unsupported("memory of a size that is not known")
        size = kind_of(match[1])[1] // 8
        asked = re.search(r"\.align (\d+)", text)
        align = max(int(asked[1]) if asked else 0, size)
        total = size
        for count in re.findall(r"\[(\d+)\]", match[3]):
            total *= int(count)
        if space == "shared":
            self.shared[match[2]] = Shared(self._shared_place(total, align), total)
        elif space == "local":
            if total > LOCAL:
                raise Unsupported(f"{total} bytes of local memory")
            kernel.locals.add(match[2])
            name = c_name(match[2])
            kernel.code.append(f"_Alignas({max(align, 8)}) u8 {name}[{total}]; memset({name}, 0xff, {total});")
        else:
            parts = re.findall(r"-?\w+", values)
            content = b"".join(self._value(v, match[1][0] == "f", size) for v in parts)
            self.globals[match[2]] = Global(total, content.ljust(total, b"\0"))

    def _shared_place(self, size, align):
        """After the preceding arrays, and no better aligned than requested."""
        place = -(-(self.shared_size + (GAP if self.shared else 0)) // align) * align
        while align < 16 and place % (2 * align) == 0:
            place += align
        self.shared_size = place + size
        return place

    @staticmethod
    def _value(text, floating, size):
        if floating and re.fullmatch(r"0[fdFD]([0-9a-fA-F]{8}){1,2}", text):
            return bytes.fromhex(text[2:])[::-1]
        return (int(text, 0) & (1 << 8 * size) - 1).to_bytes(size, "little")

    def c(self):
        out = ['#include "prelude.h"']
        for name, variable in self.globals.items():
            content = ", ".join(map(str, variable.content))
            out.append(f"static u64 g_{c_name(name)}; static const u8 i_{c_name(name)}[] = {{{content}}};")
        for number, kernel in enumerate(self.kernels):
            out += kernel.c(number)
        out.append("static const KernelInfo kernels[] = {")
        for number, kernel in enumerate(self.kernels):
            registers = self.registers.get(kernel.name, 0)
            facts = f"{len(kernel.parameters)}, {kernel.most_threads}, {registers}, sizes_{number}"
            out.append(f'{{"{kernel.name}", kernel_{number}, {facts}}},')
        out.append("{0}};\nstatic const SharedInfo shared_arrays[] = {")
        out += [f"{{{array.offset}, {array.size}}}," for array in self.shared.values()]
        out.append("{0}};\nstatic const GlobalInfo globals[] = {")
        out += [f'{{"{n}", {v.size}, i_{c_name(n)}, &g_{c_name(n)}}},' for n, v in self.globals.items()]
        out.append("{0}};")
        out.append(
            f"const ModuleInfo emulated_module = {{kernels, shared_arrays, globals, {self.shared_size}, &runtime}};"
        )
        return "\n".join(out) + "\n"
