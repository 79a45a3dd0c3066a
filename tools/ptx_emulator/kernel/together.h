/* What the lanes of a warp do together (see Collective): shuffles, votes and matrices. */
#pragma once
#define FOR_LANES(L) for (int L = 0; L < 32; L++) if (mask >> L & 1)

enum Shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BFLY, SHUFFLE_IDX };
struct Shuffled { u32 value, valid; };
struct Wanted { u32 value, lane; };

static void shuffle_all(u32 mask, void **in, void **out) {
  FOR_LANES(l) {
    struct Wanted *from = in[((struct Wanted *)in[l])->lane];
    ((struct Shuffled *)out[l])->value = from ? from->value : 0xdeadbeef; /* undefined: that lane takes no part */
  }
}

static inline struct Shuffled shuffle(Thread *t, int line, enum Shuffle mode, u32 value, u32 b, u32 c, u32 mask) {
  int lane = t->lane, segment = c >> 8 & 31, low = lane & segment, last = low | (c & 31 & ~segment), from = lane;
  b &= 31;
  if (mode == SHUFFLE_UP) from = lane - (int)b;
  if (mode == SHUFFLE_DOWN) from = lane + (int)b;
  if (mode == SHUFFLE_BFLY) from = lane ^ (int)b;
  if (mode == SHUFFLE_IDX) from = low | (b & ~segment);
  int valid = mode == SHUFFLE_UP ? from >= last : from <= last;
  struct Wanted in = {value, valid ? from : lane};
  struct Shuffled out = {0, valid};
  runtime->collective(t, line, mask, 0, shuffle_all, &in, &out);
  return out;
}

static void ballot(u32 mask, void **in, void **out) { /* in: a predicate; out: the lanes where it holds, all lanes */
  u32 r = 0;
  FOR_LANES(l) if (*(u32 *)in[l]) r |= 1u << l;
  FOR_LANES(l) ((u32 *)out[l])[0] = r, ((u32 *)out[l])[1] = mask;
}

/* mma: exact products and one rounding of their sum, where a GPU cuts off more. A lane brings a_words of A, b_words of B, each
   of two numbers of 16 bits or one of tf32, and four sums; four lanes share a row of A and a column of B. */
enum Element { F16, BF16, TF32 };
static inline f64 product(u32 a, u32 b, enum Element kind) {
  if (kind == F16) return (f64)float_f16(a) * float_f16(b) + (f64)float_f16(a >> 16) * float_f16(b >> 16);
  if (kind == BF16) return (f64)float_bf16(a) * float_bf16(b) + (f64)float_bf16(a >> 16) * float_bf16(b >> 16);
  return (f64)as_f32(a & 0xffffe000) * as_f32(b & 0xffffe000);
}
static inline void mma(void **in, void **out, int b_words, enum Element kind) {
  f32 made[32][4];
  int a_words = 2 * b_words;
  for (int l = 0; l < 32; l++)
    for (int k = 0; k < 4; k++) {
      int row = l / 4, half = k / 2, column = 2 * (l % 4) + k % 2;
      f64 sum = 0;
      for (int w = 0; w < 4 * b_words; w++) {
        u32 a = ((u32 *)in[4 * row + w % 4])[half + 2 * (w / 4)];
        u32 b = ((u32 *)in[4 * column + w % 4])[a_words + w / 4];
        sum += product(a, b, kind);
      }
      made[l][k] = (f32)(sum + ((f32 *)in[l])[a_words + b_words + k]);
    }
  for (int l = 0; l < 32; l++) memcpy(out[l], made[l], 16);
}
static void mma_f16_2(u32 mask, void **in, void **out) { mma(in, out, 2, F16); }
static void mma_f16_1(u32 mask, void **in, void **out) { mma(in, out, 1, F16); }
static void mma_bf16_2(u32 mask, void **in, void **out) { mma(in, out, 2, BF16); }
static void mma_bf16_1(u32 mask, void **in, void **out) { mma(in, out, 1, BF16); }
static void mma_tf32_2(u32 mask, void **in, void **out) { mma(in, out, 2, TF32); }
static void mma_tf32_1(u32 mask, void **in, void **out) { mma(in, out, 1, TF32); }

static inline void ldmatrix(void **in, void **out, int count, int transposed) { /* in: a pointer to a row of 8 */
  for (int l = 0; l < 32; l++)
    for (int m = 0; m < count; m++) {
      u16 pair[2];
      for (int k = 0; k < 2; k++) {
        int row = transposed ? 2 * (l % 4) + k : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + k;
        pair[k] = (*(u16 **)in[8 * m + row])[column];
      }
      ((u32 *)out[l])[m] = pair[0] | (u32)pair[1] << 16;
    }
}
#define LDMATRIX(N) \
  static void ldmatrix_##N(u32 mask, void **in, void **out) { ldmatrix(in, out, N, 0); } \
  static void ldmatrix_##N##_transposed(u32 mask, void **in, void **out) { ldmatrix(in, out, N, 1); }
LDMATRIX(1)
LDMATRIX(2)
LDMATRIX(4)
