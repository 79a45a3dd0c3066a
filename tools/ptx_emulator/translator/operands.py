"""Operands: registers, numbers and addresses of PTX as C expressions."""

import re

from .syntax import Unsupported, c_name, c_type, kind_of, split

BLOCK = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])")
SPECIAL = {
    "%laneid": "t->lane",
    "%warpid": "t->warp",
    "%nwarpid": "((t->ntid[0] * t->ntid[1] * t->ntid[2] + 31) / 32)",
    "WARP_SZ": "32u",
    "%lanemask_eq": "(1u << t->lane)",
    "%lanemask_lt": "((1u << t->lane) - 1)",
    "%lanemask_le": "((2u << t->lane) - 1)",
    "%lanemask_gt": "~((2u << t->lane) - 1)",
    "%lanemask_ge": "~((1u << t->lane) - 1)",
    "%clock": "runtime->clock()",
    "%clock64": "runtime->clock()",
    "%globaltimer": "runtime->clock()",
}


class Operands:
    """What instructions need from their kernel. Registers are (name in C, kind), looked up by scope."""

    def __init__(self, module, parameters):
        self.module, self.parameters = module, parameters
        self.scopes, self.code = [{}], []
        self.used, self.ranges, self.locals = set(), [], set()

    def declare(self, text):
        """`.reg`: for a range like %r<100>, C declares only the registers used, known at the end (see declarations)."""
        kind, names = text.split(None, 1)
        kind = kind_of(kind.lstrip("."))
        for name in split(names):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            made = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            self.scopes[-1].update({one: (c_name(one), kind) for one in made})
            self.ranges.append((len(self.code), kind, made))
            self.code.append("")

    def declarations(self):
        """Fill in the register declarations."""
        for at, kind, names in self.ranges:
            used = [f"{c_name(name)} = 0" for name in names if name in self.used]
            self.code[at] = f"{c_type(kind)} {', '.join(used)};" if used else ""

    def find(self, name):
        for scope in reversed(self.scopes):
            if name in scope:
                self.used.add(name)
                return scope[name]
        return None

    def read(self, operand, letter, bits):
        """An operand as a value of a kind."""
        want = c_type((letter, bits))
        if operand.startswith("!"):
            return f"!{self.read(operand[1:], letter, bits)}"
        number = self.number(operand, letter, bits)
        if number is not None:
            return number
        if found := self.find(operand):
            return self._converted(found, letter, bits)
        if block := BLOCK.fullmatch(operand):
            return f"({want})t->{block[1]}[{'xyz'.index(block[2])}]"
        if operand in SPECIAL:
            return f"({want}){SPECIAL[operand]}"
        if operand in self.module.shared:
            return f"({want}){self.module.shared[operand].offset}u"
        if operand in self.module.globals:
            return f"({want})g_{c_name(operand)}"
        if operand in self.locals:
            return f"({want})(u64){c_name(operand)}"
        raise Unsupported(f"operand {operand}")

    @staticmethod
    def _converted(register, letter, bits):
        """The bits of a register, read as another kind."""
        name, (have, size) = register
        if letter == "p" or (have == letter == "f" and size == bits and bits != 16):
            return name
        if have == "f" and size in (32, 64):
            name = f"bits_f{size}({name})"
        elif letter == "f" and bits in (32, 64):
            return f"as_f{bits}((u{bits}){name})"
        return f"({c_type((letter, bits))}){name}"

    def number(self, text, letter, bits):
        """A literal, or None."""
        for pattern, size in ((r"0[fF]([0-9a-fA-F]{8})", 32), (r"0[dD]([0-9a-fA-F]{16})", 64)):
            if match := re.fullmatch(pattern, text):
                return f"as_f{size}(0x{match[1]}ull)" if letter == "f" else f"0x{match[1]}ull"
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)[uU]?", text):
            return None
        text = text.rstrip("uU")
        value = int(text, 8) if re.fullmatch(r"-?0\d+", text) else int(text, 0)
        if letter == "p":
            return str(int(bool(value)))
        if letter == "f" and bits != 16:
            raise Unsupported(f"integer {text} as a float")
        return f"({c_type((letter, bits))}){value & (1 << 64) - 1:#x}ull"

    def write(self, operand, expression, kind):
        """A statement that stores a value of a kind in a register."""
        if operand == "_":
            return f"(void)({expression});"
        found = self.find(operand)
        if not found:
            raise Unsupported(f"operand {operand}")
        name, (have, size) = found
        if have == "f" and size in (32, 64):
            return f"{name} = {expression};" if kind[0] == "f" else f"{name} = as_f{size}((u{size})({expression}));"
        if kind[0] == "f" and kind[1] in (32, 64):
            return f"{name} = bits_f{kind[1]}({expression});"
        return f"{name} = {expression};"

    def address(self, text):
        """(name of a parameter or "", address or offset in it) of `[base + offset]`."""
        match = re.fullmatch(r"\[\s*([%\w$.]+?)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if not match:
            raise Unsupported(f"address {text}")
        base, offset = match[1], int(match[2] or "0", 0)
        if base in self.parameters:
            return base, offset
        if base.isdigit():
            return "", f"((u64){base} + {offset})"
        register = self.find(base)
        if register and register[1][1] == 32:
            return "", f"((u64)(u32)({register[0]} + {offset}))"
        return "", f"({self.read(base, 'u', 64)} + ({offset}ll))"
