"""PTX syntax: statements, types and operands."""

import re

LINE_DIRECTIVES = re.compile(r"\s*\.(version|target|address_size|file|loc)\b")  # end with the line, not with `;`
HEAD = re.compile(r"\.(visible|entry|func|weak|extern)\b[^=]*")


class Unsupported(Exception):
    """PTX that is not emulated."""


def kind_of(name):
    """A PTX type as (letter, bits): narrow floats and pairs of them are bits, as C has no equivalent."""
    if name == "pred":
        return "p", 1
    special = {"bf16": ("b", 16), "f16x2": ("b", 32), "bf16x2": ("b", 32), "tf32": ("b", 32)}
    match = re.fullmatch(r"([busf])(8|16|32|64)", name)
    if not match and name not in special:
        raise Unsupported(f"type {name}")
    return (match[1], int(match[2])) if match else special[name]


def c_type(kind):
    letter, bits = kind
    if letter == "p":
        return "u8"
    if letter == "f":
        return {16: "u16", 32: "f32", 64: "f64"}[bits]
    return ("s" if letter == "s" else "u") + str(bits)


def c_name(name):
    return "r_" + re.sub(r"\W", "_", name)


def split(text):
    """The parts between commas that are outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


def vector(operand):
    """The registers in `{..}`, or the single one."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


def without_comments(text):
    """The same lines, without comments."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def statements(text):
    """(text, line) of statements, labels (with their colon), heads of kernels, `{` and `}`, in order."""
    line, start, buffer = 1, 1, ""
    for part in re.split(r"([;{}:\n])", text):
        if not buffer.strip():
            buffer, start = "", line
        if part == "\n":
            line += 1
            buffer = "" if LINE_DIRECTIVES.match(buffer) else buffer + " "
            continue
        buffer += part
        own = re.sub(r"\s+", " ", buffer).strip()
        if part == ";":
            yield own[:-1].strip(), start
        elif part in ("{", "}") and own == part:
            yield part, line
        elif part == "{" and HEAD.fullmatch(own[:-1]):
            yield own[:-1].strip(), start
            yield "{", line
        elif part == ":" and re.fullmatch(r"[\w$]+:", own):
            yield own, start
        else:
            continue
        buffer = ""
    if buffer.strip():
        raise Unsupported(f"line {start}: the file ends within {buffer.strip()[:80]}")
