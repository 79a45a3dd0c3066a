"""Logic, shifts, moves and conversions."""

from .operands import Operands
from .syntax import Unsupported, c_type, kind_of, split, vector

ROUNDINGS = ("rni", "rzi", "rmi", "rpi")  # to integers


class Bits(Operands):
    """op_NAME as in Arithmetic."""

    def logic(self, words, args, form):
        kind = kind_of(words[-1])
        made = form(*(f"({c_type(kind)})({self.read(a, *kind)})" for a in args[1:]))
        return self.write(args[0], f"({made}) & 1" if kind[0] == "p" else made, kind)

    def op_and(self, words, args, line):
        return self.logic(words, args, lambda a, b: f"{a} & {b}")

    def op_or(self, words, args, line):
        return self.logic(words, args, lambda a, b: f"{a} | {b}")

    def op_xor(self, words, args, line):
        return self.logic(words, args, lambda a, b: f"{a} ^ {b}")

    def op_not(self, words, args, line):
        return self.logic(words, args, lambda a: f"~{a}")

    def shifted(self, words, args, name):
        letter, bits = kind_of(words[-1])
        letter = "s" if letter == "s" and name == "right" else "u"
        function = f"shift_{name}" + ("_signed" if letter == "s" else "")
        call = f"{function}({self.read(args[1], letter, bits)}, {self.read(args[2], 'u', 32)}, {bits})"
        return self.write(args[0], f"({c_type((letter, bits))}){call}", (letter, bits))

    def op_shl(self, words, args, line):
        return self.shifted(words, args, "left")

    def op_shr(self, words, args, line):
        return self.shifted(words, args, "right")

    def op_shf(self, words, args, line):
        a, b, c = (self.read(x, "u", 32) for x in args[1:4])
        amount = f"({c} & 31)" if "wrap" in words else f"({c} > 32 ? 32 : {c})"
        return self.write(args[0], f"funnel_{words[0]}({a}, {b}, {amount})", ("u", 32))

    def op_bfe(self, words, args, line):
        letter, bits = kind_of(words[-1])
        a, b, c = self.read(args[1], "u", bits), self.read(args[2], "u", 32), self.read(args[3], "u", 32)
        return self.write(args[0], f"extract({a}, {b}, {c}, {int(letter == 's')}, {bits})", ("u", bits))

    def op_bfi(self, words, args, line):
        bits = kind_of(words[-1])[1]
        a, b = self.read(args[1], "u", bits), self.read(args[2], "u", bits)
        c, d = self.read(args[3], "u", 32), self.read(args[4], "u", 32)
        return self.write(args[0], f"insert({a}, {b}, {c}, {d}, {bits})", ("u", bits))

    def op_prmt(self, words, args, line):
        if len(words) > 1:
            raise Unsupported("mode of prmt")
        a, b, c = (self.read(x, "u", 32) for x in args[1:])
        return self.write(args[0], f"permute_bytes({a}, {b}, {c})", ("u", 32))

    def op_popc(self, words, args, line):
        value = self.read(args[1], "u", kind_of(words[-1])[1])
        return self.write(args[0], f"__builtin_popcountll({value})", ("u", 32))

    def op_clz(self, words, args, line):
        bits = kind_of(words[-1])[1]
        value = self.read(args[1], "u", bits)
        return self.write(args[0], f"{value} ? __builtin_clzll({value}) - {64 - bits} : {bits}", ("u", 32))

    def op_brev(self, words, args, line):
        bits = kind_of(words[-1])[1]
        return self.write(args[0], f"reversed({self.read(args[1], 'u', bits)}, {bits})", ("u", bits))

    def op_mov(self, words, args, line):
        kind = kind_of(words[-1])
        to, source = args
        if not to.startswith("{") and not source.startswith("{"):
            return self.write(to, self.read(source, *kind), kind)
        parts = split((to if to.startswith("{") else source)[1:-1])
        whole, each = kind[1], kind[1] // len(parts)
        if source.startswith("{"):
            made = (f"(u{whole})({self.read(p, 'u', each)}) << {each * i}" for i, p in enumerate(parts))
            return self.write(to, " | ".join(made), ("u", whole))
        made = (self.write(p, f"(u{each})(whole >> {each * i})", ("u", each)) for i, p in enumerate(vector(to)))
        return f"{{ u{whole} whole = {self.read(source, 'u', whole)}; {' '.join(made)} }}"

    def op_cvta(self, words, args, line):
        value = self.read(args[1], "u", 64)
        if [w for w in words if w.startswith("shared")]:
            value = f"{value} {'-' if 'to' in words else '+'} SHARED_WINDOW"
        return self.write(args[0], value, ("u", 64))

    def op_cvt(self, words, args, line):
        target, source = words[-2:]
        if {"rz", "rm", "rp", "relu", "satfinite", "pack"} & {*words}:
            raise Unsupported("this rounding or packing")
        if target in ("f16x2", "bf16x2"):
            down = "f16_float" if target == "f16x2" else "bf16_float"
            high, low = (self.read(a, "f", 32) for a in args[1:])
            return self.write(args[0], f"(u32){down}({high}) << 16 | {down}({low})", ("u", 32))
        if target == "tf32":
            if "rna" not in words:
                raise Unsupported("rounding")
            return self.write(args[0], f"tf32_float({self.read(args[1], 'f', 32)})", ("u", 32))
        if source in ("f16", "bf16"):
            value, kind = f"float_{source}({self.read(args[1], 'u', 16)})", ("f", 32)
        else:
            kind = kind_of(source)
            value = self.read(args[1], *kind)
        rounding = next((w for w in words if w in ROUNDINGS), None)
        if target in ("f16", "bf16"):
            value = f"(f32)round_{rounding}({value})" if rounding else value
            wide = target == "f16" and kind != ("f", 32)  # not via float32, which would round twice
            return self.write(args[0], f"{'f16_double' if wide else f'{target}_float'}({value})", ("u", 16))
        return self._converted_number(words, args[0], value, kind, kind_of(target), rounding)

    def _converted_number(self, words, to, value, kind, result, rounding):
        """Between integers, float32 and float64."""
        if "sat" in words and (kind[0] != "f" or result[0] != "f"):
            raise Unsupported("sat")
        if kind[0] == "f" and result[0] != "f":  # NaN becomes a different integer from float64 to 32 bits
            head = "double" if kind[1] == 64 and result[1] == 32 else "float"
            return self.write(to, f"{c_type(result)}_{head}(round_{rounding}({value}))", result)
        if kind[0] == "f" and rounding:
            value = f"round_{rounding}({value})"
        value = f"({c_type(result)})({value})"
        return self.write(to, f"saturated({value})" if "sat" in words else value, result)
