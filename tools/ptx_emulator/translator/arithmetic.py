"""Arithmetic, comparisons and selection."""

import re

from .operands import Operands
from .syntax import Unsupported, c_type, kind_of

SIGNS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def is_narrow(name):
    """float16, bfloat16 and pairs of them."""
    return re.fullmatch(r"b?f16(x2)?", name) is not None


class Arithmetic(Operands):
    """Each op_NAME(words, args, line) returns a C statement; words are the dot-separated parts after the name."""

    def plain(self, words, args, form):
        """args[0] = form(the others), all of the instruction's type."""
        kind = kind_of(words[-1])
        return self.write(args[0], form(*(self.read(a, *kind) for a in args[1:])), kind)

    def narrow(self, words, args, form):
        """form in float32, rounded once more: correct for +, - and *, as float32 has more than twice the bits."""
        up, down = ("float_bf16", "bf16_float") if words[-1].startswith("bf") else ("float_f16", "f16_float")
        if not words[-1].endswith("x2"):
            made = form(*(f"{up}({self.read(a, 'u', 16)})" for a in args[1:]))
            return self.write(args[0], f"{down}({made})", ("u", 16))
        low = form(*(f"{up}((u16){self.read(a, 'u', 32)})" for a in args[1:]))
        high = form(*(f"{up}((u16)({self.read(a, 'u', 32)} >> 16))" for a in args[1:]))
        return self.write(args[0], f"(u32){down}({low}) | (u32){down}({high}) << 16", ("u", 32))

    def arithmetic(self, words, args, form):
        if "cc" in words:
            raise Unsupported("carries")
        if is_narrow(words[-1]):
            return self.narrow(words, args, form)
        letter, bits = kind_of(words[-1])
        if letter != "f":  # unsigned, as signed overflow wraps around just the same
            return self.plain([f"u{bits}"], args, lambda *values: f"(u{bits})({form(*values)})")
        if "rz" in words or "rp" in words or ("rm" in words and bits != 32):
            raise Unsupported("rounding")
        if "rm" in words:
            return self.plain(words, args, lambda *values: f"round_down({form(*(f'(f64){v}' for v in values))})")
        return self.plain(
            words, args, lambda *values: f"saturated({form(*values)})" if "sat" in words else form(*values)
        )

    def op_add(self, words, args, line):
        return self.arithmetic(words, args, lambda a, b: f"{a} + {b}")

    def op_sub(self, words, args, line):
        return self.arithmetic(words, args, lambda a, b: f"{a} - {b}")

    def op_neg(self, words, args, line):
        return self.arithmetic(words, args, lambda a: f"-({a})")

    def op_mul(self, words, args, line):
        if is_narrow(words[-1]):
            return self.arithmetic(words, args, lambda a, b: f"{a} * {b}")
        letter, bits = kind = kind_of(words[-1])
        if "wide" in words:
            return self.write(args[0], self.wide_product(kind, args), (letter, 2 * bits))
        if "hi" in words:
            whole = "__int128" if letter == "s" else "unsigned __int128"
            a, b = (f"({whole}){self.read(x, *kind)}" for x in args[1:])
            return self.write(args[0], f"({c_type(kind)})(({a} * {b}) >> {bits})", kind)
        if bits == 16:  # C would multiply as int, with undefined overflow
            return self.plain(["u16"], args, lambda a, b: f"(u16)((u32){a} * (u32){b})")
        return self.arithmetic(words, args, lambda a, b: f"{a} * {b}")

    def wide_product(self, kind, args):
        double = c_type((kind[0], 2 * kind[1]))
        return " * ".join(f"({double})({self.read(x, *kind)})" for x in args[1:3])

    def op_mad(self, words, args, line):
        letter, bits = kind = kind_of(words[-1])
        if letter == "f":
            return self.op_fma(words, args, line)
        if "hi" in words:
            raise Unsupported("mad.hi")
        if "wide" in words:
            sum_ = f"(u{2 * bits})({self.wide_product(kind, args)}) + {self.read(args[3], 'u', 2 * bits)}"
            return self.write(args[0], sum_, ("u", 2 * bits))
        return self.arithmetic(words, args, lambda a, b, c: f"{a} * {b} + {c}")

    def op_fma(self, words, args, line):
        if is_narrow(words[-1]):  # the sum is rounded to float32 first, then again, which rarely matters
            return self.narrow(words, args, lambda a, b, c: f"(f32)((f64){a} * {b} + {c})")
        name = "fmaf" if words[-1] == "f32" and "rm" not in words else "fma"
        return self.arithmetic(words, args, lambda a, b, c: f"__builtin_{name}({a}, {b}, {c})")

    def op_div(self, words, args, line):
        kind = kind_of(words[-1])
        if kind[0] == "f":
            return self.arithmetic(words, args, lambda a, b: f"{a} / {b}")
        return self.plain(words, args, lambda a, b: f"div_{c_type(kind)}({a}, {b})")

    def op_rem(self, words, args, line):
        return self.plain(words, args, lambda a, b: f"rem_{c_type(kind_of(words[-1]))}({a}, {b})")

    def extreme(self, words, args, name, sign):
        if is_narrow(words[-1]):
            return self.narrow(words, args, lambda a, b: f"f{name}f({a}, {b})")
        letter, bits = kind_of(words[-1])
        if letter != "f":
            return self.plain(words, args, lambda a, b: f"{a} {sign} {b} ? {a} : {b}")
        nan = "({0} != {0} || {1} != {1}) ? NAN : " if "NaN" in words else ""
        return self.plain(words, args, lambda a, b: f"{nan.format(a, b)}f{name}{'f' * (bits == 32)}({a}, {b})")

    def op_min(self, words, args, line):
        return self.extreme(words, args, "min", "<")

    def op_max(self, words, args, line):
        return self.extreme(words, args, "max", ">")

    def op_abs(self, words, args, line):
        if is_narrow(words[-1]):
            return self.narrow(words, args, lambda a: f"fabsf({a})")
        letter, bits = kind_of(words[-1])
        if letter == "f":
            return self.function(words, args, "fabs{f}({0})")
        return self.plain(words, args, lambda a: f"{a} < 0 ? (s{bits})(0 - (u{bits}){a}) : {a}")

    def function(self, words, args, form):
        """A function of one float; `{f}` is the suffix of C's float32 functions. They are more accurate than a
        GPU's."""
        if {"rz", "rm", "rp"} & {*words}:
            raise Unsupported("rounding")
        tail = "f" if kind_of(words[-1])[1] == 32 else ""
        return self.plain(words, args, lambda a: form.format(a, f=tail))

    def op_sqrt(self, words, args, line):
        return self.function(words, args, "sqrt{f}({0})")

    def op_rsqrt(self, words, args, line):
        return self.function(words, args, "1 / sqrt{f}({0})")

    def op_rcp(self, words, args, line):
        return self.function(words, args, "1 / ({0})")

    def op_ex2(self, words, args, line):
        return self.function(words, args, "exp2{f}({0})")

    def op_lg2(self, words, args, line):
        return self.function(words, args, "log2{f}({0})")

    def op_sin(self, words, args, line):
        return self.function(words, args, "sin{f}({0})")

    def op_cos(self, words, args, line):
        return self.function(words, args, "cos{f}({0})")

    def op_copysign(self, words, args, line):
        return self.plain(words, args, lambda a, b: f"copysign{'f' * (words[-1] == 'f32')}({b}, {a})")

    def comparison(self, name, type_name, a, b):
        if is_narrow(type_name):
            up = "float_bf16" if type_name == "bf16" else "float_f16"
            a, b, floating = f"{up}({self.read(a, 'u', 16)})", f"{up}({self.read(b, 'u', 16)})", True
        else:
            letter, bits = kind_of(type_name)
            letter = "u" if name in ("lo", "ls", "hi", "hs") else letter
            a, b, floating = self.read(a, letter, bits), self.read(b, letter, bits), letter == "f"
        unordered = f"({a} != {a} || {b} != {b})"
        if name in ("num", "nan"):
            return unordered if name == "nan" else f"!{unordered}"
        if floating and name.endswith("u"):  # also true of NaN
            return f"({unordered} || {a} {SIGNS[name[:-1]]} {b})"
        if floating and name == "ne":
            return f"(!{unordered} && {a} != {b})"
        return f"({a} {SIGNS[name]} {b})"

    def op_setp(self, words, args, line):
        words = [w for w in words if w != "ftz"]
        test = self.comparison(words[0], words[-1], args[1], args[2])
        made = [test, f"!{test}"]
        if len(words) == 3:
            sign, other = {"and": "&", "or": "|", "xor": "^"}[words[1]], self.read(args[3], "p", 1)
            made = [f"({value}) {sign} ({other})" for value in made]
        return " ".join(self.write(target, value, ("p", 1)) for target, value in zip(args[0].split("|"), made))

    def op_selp(self, words, args, line):
        kind = kind_of(words[-1])
        a, b = self.read(args[1], *kind), self.read(args[2], *kind)
        return self.write(args[0], f"{self.read(args[3], 'p', 1)} ? {a} : {b}", kind)
