/* Integers, floating point and conversions. */
#pragma once
typedef _Float16 f16;

static inline u32 bits_f32(f32 x) { u32 r; memcpy(&r, &x, 4); return r; }
static inline f32 as_f32(u32 x) { f32 r; memcpy(&r, &x, 4); return r; }
static inline u64 bits_f64(f64 x) { u64 r; memcpy(&r, &x, 8); return r; }
static inline f64 as_f64(u64 x) { f64 r; memcpy(&r, &x, 8); return r; }

/* RESULT_SOURCE(x); NaN becomes the one that a GPU makes */
static inline u16 bits_f16(f16 x) { u16 r; memcpy(&r, &x, 2); return r; }
static inline f32 float_f16(u16 x) { f16 r; memcpy(&r, &x, 2); return (f32)r; }
static inline u16 f16_float(f32 x) { return x != x ? 0x7fff : bits_f16((f16)x); }
static inline u16 f16_double(f64 x) { return x != x ? 0x7fff : bits_f16((f16)x); }
static inline f32 float_bf16(u16 x) { return as_f32((u32)x << 16); }
static inline u16 bf16_float(f32 x) {
  u32 bits = bits_f32(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline u32 tf32_float(f32 x) { /* ties away from zero */
  u32 bits = bits_f32(x);
  return x != x ? 0x7fffffff : isinf(x) ? bits : (bits + 0x1000) & 0xffffe000;
}

/* to integers: saturating, NaN as the manual of PTX says */
#define TO_INTEGER(NAME, T, LOW, HIGH, NAN_IS) \
  static inline T NAME(f64 x) { \
    return x != x ? (T)(NAN_IS) : x <= (f64)(LOW) ? (T)(LOW) : x >= (f64)(HIGH) ? (T)(HIGH) : (T)x; \
  }
TO_INTEGER(s8_float, s8, -128, 127, 0)
TO_INTEGER(u8_float, u8, 0, 255, 0)
TO_INTEGER(s16_float, s16, -32768, 32767, 0)
TO_INTEGER(u16_float, u16, 0, 65535, 0)
TO_INTEGER(s32_float, s32, INT32_MIN, INT32_MAX, 0)
TO_INTEGER(u32_float, u32, 0, UINT32_MAX, 0)
TO_INTEGER(s64_float, s64, INT64_MIN, INT64_MAX, 1ull << 63)
TO_INTEGER(u64_float, u64, 0, UINT64_MAX, 1ull << 63)
TO_INTEGER(s32_double, s32, INT32_MIN, INT32_MAX, 1u << 31)
TO_INTEGER(u32_double, u32, 0, UINT32_MAX, 1u << 31)
static inline f64 round_rni(f64 x) { return rint(x); }
static inline f64 round_rzi(f64 x) { return trunc(x); }
static inline f64 round_rmi(f64 x) { return floor(x); }
static inline f64 round_rpi(f64 x) { return ceil(x); }

static inline f32 saturated(f32 x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
static inline f32 round_down(f64 x) {
  f32 r = (f32)x;
  return r > x ? nextafterf(r, -INFINITY) : r;
}

/* what C leaves undefined: dividing by zero, the least number by -1, shifts by too much */
#define DIVISION(T, U, SIGNED) \
  static inline T div_##T(T a, T b) { return b == 0 ? (T)-1 : SIGNED && b == (T)-1 ? (T)(0 - (U)a) : a / b; } \
  static inline T rem_##T(T a, T b) { return b == 0 ? a : SIGNED && b == (T)-1 ? 0 : a % b; }
DIVISION(s16, u16, 1)
DIVISION(s32, u32, 1)
DIVISION(s64, u64, 1)
DIVISION(u16, u16, 0)
DIVISION(u32, u32, 0)
DIVISION(u64, u64, 0)
static inline u64 shift_left(u64 a, u32 n, u32 bits) { return n >= bits ? 0 : a << n; }
static inline u64 shift_right(u64 a, u32 n, u32 bits) { return n >= bits ? 0 : a >> n; }
static inline s64 shift_right_signed(s64 a, u32 n, u32 bits) { return a >> (n >= bits ? bits - 1 : n); }
static inline u32 funnel_l(u32 a, u32 b, u32 n) { return ((u64)b << 32 | a) << n >> 32; }
static inline u32 funnel_r(u32 a, u32 b, u32 n) { return ((u64)b << 32 | a) >> n; }

static inline u64 extract(u64 a, u32 at, u32 length, int is_signed, u32 bits) { /* bfe */
  at &= 255, length &= 255;
  u32 top = at + length - 1 < bits ? at + length - 1 : bits - 1;
  u64 sign = is_signed && length ? a >> top & 1 : 0, r = 0;
  for (u32 i = 0; i < bits; i++) r |= (i < length && at + i < bits ? a >> (at + i) & 1 : sign) << i;
  return r;
}
static inline u64 insert(u64 a, u64 b, u32 at, u32 length, u32 bits) { /* bfi */
  at &= 255, length &= 255;
  for (u32 i = 0; i < length && at + i < bits; i++) b = (b & ~(1ull << (at + i))) | (a >> i & 1) << (at + i);
  return b;
}
static inline u32 permute_bytes(u32 a, u32 b, u32 selectors) { /* prmt */
  u64 all = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> 4 * i & 15, byte = all >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}
static inline u64 reversed(u64 x, int bits) {
  u64 r = 0;
  for (int i = 0; i < bits; i++) r |= (x >> i & 1) << (bits - 1 - i);
  return r;
}
