"""Makes numba-cuda link to PTX, which the emulator's driver loads, instead of machine code. The driver runs this file.

The real linker still runs, so that what it would reject is rejected, and the number of registers is known.
"""

import functools
import struct
import sys

REGISTER_COUNT = 0x2F  # attribute of a kernel in .nv.info
SIZED = 4  # format of attributes with a length and content


def registers(cubin):
    """(kernel, registers per thread) for the kernels of a cubin, a 64-bit ELF file."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, at + i * size) for i in range(count)]

    def text(section, offset):
        return cubin[section[4] + offset :].split(b"\0", 1)[0].decode()

    found = {text(sections[names], section[0]): section for section in sections}
    symbols, strings, info = found[".symtab"], found[".strtab"], found[".nv.info"]
    place, end = info[4], info[4] + info[5]
    while place < end:
        form, attribute, length = struct.unpack_from("<BBH", cubin, place)
        place += 4
        if form != SIZED:
            continue
        if attribute == REGISTER_COUNT:
            symbol, value = struct.unpack_from("<II", cubin, place)
            (name,) = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)
            yield text(strings, name), value
        place += length


def patch(driver):
    """Replace the output of the linker of numba.cuda.cudadrv.driver."""
    link = driver._Linker.complete

    @functools.wraps(link)
    def complete(self):
        codes = self._object_codes
        if any(code.code_type != "ptx" for code in codes):  # link-time optimisation, with output as PTX
            linker = driver.Linker(*codes, options=self._get_linker_options(ptx=True))
            text = bytes(linker.link("ptx").code).decode()
        else:
            text = "\n".join(bytes(code.code).decode() for code in codes)
        cubin = bytes(link(self).code)
        told = "".join(f"// emulator: {name} registers {number}\n" for name, number in registers(cubin))
        return driver.ObjectCode.from_ptx(f"{text.rstrip(chr(0))}\n{told}\0".encode())

    complete.emulated = True
    driver._Linker.complete = complete


module = sys.modules.get("numba.cuda.cudadrv.driver")
if hasattr(module, "_Linker") and not hasattr(module._Linker.complete, "emulated"):
    patch(module)
