"""What threads do together: barriers, votes, shuffles and matrix products; and branches."""

import re

from .operands import Operands
from .syntax import Unsupported, c_name, split

ALL = "~0u"  # lanes
# (shape, type of A and B): words of B per lane; there are twice as many of A
PRODUCTS = {("m16n8k16", "f16"): 2, ("m16n8k16", "bf16"): 2, ("m16n8k8", "tf32"): 2, ("m16n8k8", "f16"): 1,
            ("m16n8k8", "bf16"): 1, ("m16n8k4", "tf32"): 1}  # fmt: skip


class Together(Operands):
    """op_NAME as in Arithmetic."""

    def op_bar(self, words, args, line):
        if "warp" in words:
            return f"runtime->warp_barrier(t, {line}, {self.read(args[0], 'u', 32)});"
        if "red" in words or "arrive" in words:
            raise Unsupported("bar.red and bar.arrive")
        number, count = [*(self.read(a, "u", 32) for a in args), "0"][:2]
        return f"runtime->barrier(t, {line}, {number}, {count});"

    op_barrier = op_bar

    def op_mma(self, words, args, line):
        shape = next(w for w in words if re.fullmatch(r"m\d+n\d+k\d+", w))
        result, kind, other, sums = words[words.index("col") + 1 :]
        count = PRODUCTS.get((shape, kind))
        if not count or kind != other or (result, sums) != ("f32", "f32"):
            raise Unsupported("this shape or type of mma")
        d, a, b, c = (split(x[1:-1]) for x in args)
        if (len(a), len(b), len(c), len(d)) != (2 * count, count, 4, 4):
            raise Unsupported("operands of mma")
        inputs = ", ".join(self.read(x, "u", 32) for x in (*a, *b, *c))
        made = f"u32 in[] = {{{inputs}}}; f32 out[4]; "
        made += f"runtime->collective(t, {line}, {ALL}, 1, mma_{kind}_{count}, in, out); "
        return f"{{ {made}{' '.join(self.write(x, f'out[{i}]', ('f', 32)) for i, x in enumerate(d))} }}"

    def op_ldmatrix(self, words, args, line):
        count = int(next(w[1] for w in words if w in ("x1", "x2", "x4")))
        if "m8n8" not in words or "b16" not in words:
            raise Unsupported("shape of ldmatrix")
        _, address = self.address(args[1])
        if not [w for w in words if w.startswith("shared")]:
            address = f"{address} - SHARED_WINDOW"
        name = f"ldmatrix_{count}{'_transposed' if 'trans' in words else ''}"
        made = f"void *in = t->lane < {8 * count} ? shared(t, {line}, {address}, 16, READ) : 0; u32 out[4]; "
        made += f"runtime->collective(t, {line}, {ALL}, 1, {name}, &in, out); "
        targets = split(args[0][1:-1])
        return f"{{ {made}{' '.join(self.write(x, f'out[{i}]', ('u', 32)) for i, x in enumerate(targets))} }}"

    def op_shfl(self, words, args, line):
        mode = next(w for w in words if w in ("up", "down", "bfly", "idx"))
        if "sync" not in words:
            raise Unsupported("shfl without sync")
        a, b, c, mask = (self.read(x, "u", 32) for x in args[1:5])
        value, *valid = args[0].split("|")
        made = f"struct Shuffled got = shuffle(t, {line}, SHUFFLE_{mode.upper()}, {a}, {b}, {c}, {mask}); "
        made += self.write(value, "got.value", ("u", 32))
        return f"{{ {made} {' '.join(self.write(v, 'got.valid', ('p', 1)) for v in valid)} }}"

    def op_vote(self, words, args, line):
        if "sync" not in words:
            raise Unsupported("vote without sync")
        value, mask = self.read(args[1], "p", 1), self.read(args[2], "u", 32)
        made = f"u32 in = {value}, out[2]; runtime->collective(t, {line}, {mask}, 0, ballot, &in, out); "
        forms = {"any": "out[0] != 0", "all": "out[0] == out[1]", "uni": "out[0] == 0 || out[0] == out[1]"}
        if "ballot" in words:
            return f"{{ {made}{self.write(args[0], 'out[0]', ('u', 32))} }}"
        return f"{{ {made}{self.write(args[0], forms[words[1]], ('p', 1))} }}"

    def op_bra(self, words, args, line):
        return f"goto {c_name(args[0])};"

    def op_ret(self, words, args, line):
        return "return;"

    op_exit = op_ret

    def op_trap(self, words, args, line):
        return f'runtime->fault(t, {line}, "trap", 0, 0);'
