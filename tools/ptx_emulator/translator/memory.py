"""Loads, stores, atomic operations and asynchronous copies."""

from .operands import Operands
from .syntax import Unsupported, c_type, kind_of, vector

SPACES = {"global": "memory", "const": "memory", "shared": "shared", "local": "local", "param": "param"}
ATOMICS = {
    "add": "{down}({a} + {b})", "exch": "{first}", "cas": "old == {first} ? {last} : old", "min": "{a} < {b} ? {a} : {b}",
    "max": "{a} > {b} ? {a} : {b}", "and": "{a} & {b}", "or": "{a} | {b}", "xor": "{a} ^ {b}",
    "inc": "{a} >= {b} ? 0 : {a} + 1", "dec": "{a} == 0 || {a} > {b} ? {b} : {a} - 1",
}  # fmt: skip


class Memory(Operands):
    """op_NAME as in Arithmetic."""

    def place(self, words, operand, size, line, access):
        """A pointer to what an operand's address refers to, after checks."""
        spaces = [SPACES[w.split("::")[0]] for w in words if w.split("::")[0] in SPACES]
        function = spaces[0] if spaces else "generic"
        name, address = self.address(operand)
        if name or function == "param":
            if access != "READ" or not name:
                raise Unsupported("this use of parameters")
            return f"((char *)params[{list(self.parameters).index(name)}] + {address})"
        return f"{function}(t, {line}, {address}, {size}, {access})"

    @staticmethod
    def width(words):
        return int(next((w[1] for w in words if w in ("v2", "v4", "v8")), 1))

    def op_ld(self, words, args, line):
        kind, many = kind_of(words[-1]), self.width(words)
        place = self.place(words, args[1], kind[1] // 8 * many, line, "READ")
        loads = " ".join(f"{c_type(kind)} v{i} = from[{i}];" for i in range(many))  # a load may overwrite the address
        stores = " ".join(self.write(to, f"v{i}", kind) for i, to in enumerate(vector(args[0])))
        return f"{{ {c_type(kind)} *from = (void *){place}; {loads} {stores} }}"

    op_ldu = op_ld

    def op_st(self, words, args, line):
        kind, many = kind_of(words[-1]), self.width(words)
        place = self.place(words, args[0], kind[1] // 8 * many, line, "WRITE")
        stores = " ".join(f"to[{i}] = {self.read(value, *kind)};" for i, value in enumerate(vector(args[1])))
        return f"{{ {c_type(kind)} *to = {place}; {stores} }}"

    def atomic(self, words, target, operand, sources, line):
        name, many = words[-1], self.width(words)
        action = next((w for w in words if w in ATOMICS), None)
        kind = kind_of(name)
        narrow = name in ("f16", "bf16")
        if action is None or name.endswith("x2") or ((kind[0] == "f" or narrow) and action not in ("add", "exch")):
            raise Unsupported("this atomic operation")
        place = self.place(words, operand, kind[1] // 8 * many, line, "ATOMIC")
        made = f"{c_type(kind)} *m = {place}, old; "
        for i in range(many):
            values = [self.read(vector(s)[i], *(("u", 16) if narrow else kind)) for s in sources]
            a, b = (f"float_{name}(old)", f"float_{name}({values[0]})") if narrow else ("old", values[0])
            down = f"{name}_float" if narrow else ""
            new = ATOMICS[action].format(a=a, b=b, down=down, first=values[0], last=values[-1])
            made += f"old = m[{i}]; m[{i}] = {new}; "
            made += self.write(vector(target)[i], "old", kind) if target else ""
        return f"{{ {made} }}"

    def op_atom(self, words, args, line):
        return self.atomic(words, args[0], args[1], args[2:], line)

    def op_red(self, words, args, line):
        return self.atomic(words, None, args[0], args[1:], line)

    def op_cp(self, words, args, line):
        if words[0] != "async" or "bulk" in words or "mbarrier" in words:
            raise Unsupported("this copy")
        if "commit_group" in words:
            return "t->group++;"
        if "wait_group" in words:
            return f"copy_wait(t, {args[0]});"
        if "wait_all" in words:
            return "t->group++; copy_wait(t, 0);"
        (_, to), (_, source), size = self.address(args[0]), self.address(args[1]), args[2]
        if "cg" in words and size != "16":
            raise Unsupported("cp.async.cg of other than 16 bytes")
        amount = self.read(args[3], "u", 32) if len(args) > 3 else size
        return f"copy_async(t, {line}, {to}, {source}, {size}, {amount});"

    def op_nothing(self, words, args, line):
        """Memory is coherent here; caches and time do not exist."""
        return ";"

    op_prefetch = op_prefetchu = op_membar = op_fence = op_nanosleep = op_nothing
