/* Products of whole matrices in float32 or bfloat16, for processors with AVX-512.
 *
 * left [M, K] @ right [K, N], where each may lie turned. A word is 32 bits: a float32, or two bfloat16 that follow each
 * other along K. Registers hold ROWS x COLUMNS * W sums; for each word along K a few words of the left are spread over
 * registers and meet COLUMNS registers of the right. So that these lie beside each other the right is packed before, in
 * panels of WIDTH columns, and a turned left in panels of ROWS. Sums are float32, and do not depend on threads.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const void *at;
    long stride; /* numbers from one row to the next, as it lies */
    int turned;  /* left [K, M], right [N, K] */
} Matrix;

typedef struct {
    Matrix left, right;
    void *out; /* [M, N]: float32 where `wide`, to which is added where `add`; else as left and right */
    long M, N, K;
    int low, wide, add; /* N is a multiple of W; K is even where bfloat16 lies along it */
} Product;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#include <omp.h>

#define INLINE static inline __attribute__((always_inline))
enum { W = 16, ROWS = 8, COLUMNS = 3, WIDTH = COLUMNS * W };

/* Of K as many words at once that a panel of each side stays in a core's caches; and as many rows of the left. */
enum { DEEP = 1024, HELD = 96 * 1024, SUMS = 256 * 1024 };

typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long rounded(long n, long to) { return (n + to - 1) / to * to; }

/* ---- packing ---------------------------------------------------------------------------------------------------- */

/* `rows` rows (a multiple of W) of `words` words become columns: out[word][row], WIDTH apart. */
static void turn(const float *from, long stride, long rows, long words, float *out) {
    for (long row = 0; row < rows; row += W)
        for (long word = 0; word < words; word += W) {
            __m512i a[W], b[W];
            __mmask16 there = words - word < W ? (1 << (words - word)) - 1 : 0xffff;
            for (int i = 0; i < W; i++) a[i] = _mm512_maskz_loadu_epi32(there, from + (row + i) * stride + word);
            for (int i = 0; i < W; i += 2) {
                b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            }
            for (int i = 0; i < W; i += 4)
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                    a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
                }
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < W; j += 8) {
                    b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
                    b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
                }
            for (int i = 0; i < 8; i++) {
                a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
                a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
            }
            for (int i = 0; i < least(W, words - word); i++) _mm512_storeu_si512(out + (word + i) * WIDTH + row, a[i]);
        }
}

/* W words along K, of neighbouring columns of a matrix whose rows lie along K: from one row of float32, or from two rows
 * of bfloat16, the second of which may be missing. `there` tells which columns exist. */
INLINE __m512i words_of(const void *first, const void *second, int low, __mmask16 there) {
    if (!low) return _mm512_maskz_loadu_epi32(there, first);
    __m512i low_half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, first));
    __m512i high_half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second ? there : 0, second));
    return _mm512_or_si512(low_half, _mm512_slli_epi32(high_half, 16));
}

/* Two panels of ROWS, `apart` from each other. */
INLINE void put_halves(__m512i words, float *out, long apart) {
    _mm256_storeu_si256((__m256i *)out, _mm512_castsi512_si256(words));
    _mm256_storeu_si256((__m256i *)(out + apart), _mm512_extracti64x4_epi64(words, 1));
}

/* `deep` words from `begin` of rows [m, m + rows) of a left that lies turned, into panels of ROWS. */
INLINE void pack_left(const Product *y, int low, long m, long rows, long begin, long deep, float *out) {
    long size = low ? 2 : 4, step = y->left.stride * size, apart = deep * ROWS;
    for (long word = begin; word < begin + deep; word++, out += ROWS) {
        const char *first = (const char *)y->left.at + (low ? 2 * word : word) * step + m * size;
        const char *second = low && 2 * word + 1 < y->K ? first + step : NULL;
        float *to = out;
        long r = 0;
        if (second || !low)
            for (; r + W <= rows; r += W, to += 2 * apart)
                put_halves(words_of(first + r * size, first + r * size + step, low, 0xffff), to, apart);
        for (; r < rows; r += W, to += 2 * apart) {
            __mmask16 there = rows - r < W ? (1 << (rows - r)) - 1 : 0xffff;
            put_halves(words_of(first + r * size, second ? second + r * size : NULL, low, there), to, apart);
        }
    }
}

/* Words [from, to) of all columns of a right as it lies, into panels of WIDTH that hold `deep` words from `begin`. */
INLINE void pack_right(const Product *y, int low, long begin, long deep, long from, long to, float *out) {
    long size = low ? 2 : 4, step = y->right.stride * size;
    for (long word = from; word < to; word++) {
        const char *first = (const char *)y->right.at + (low ? 2 * word : word) * step;
        const char *second = low && 2 * word + 1 < y->K ? first + step : NULL;
        float *place = out + (word - begin) * WIDTH;
        for (long n = 0; n < y->N; n += WIDTH, place += deep * WIDTH)
            for (long c = 0; c < least(WIDTH, y->N - n); c += W) {
                const char *there = second ? second + (n + c) * size : NULL;
                _mm512_storeu_si512(place + c, words_of(first + (n + c) * size, there, low, 0xffff));
            }
    }
}

/* ---- multiplying ------------------------------------------------------------------------------------------------ */

INLINE vec times(vec sum, vec a, vec b, int low) {
#ifdef __AVX512BF16__
    if (low) {
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
#endif
    return sum + a * b;
}

INLINE void narrow(vec from, uint16_t *to) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)from));
#endif
}

typedef struct {
    void *at;
    long stride;
    int wide, add;
} Out;

/* rows x columns * W of the result. The left's word (r, k) stands at r * row + k * step, the right's panel at B. */
INLINE void tile(int rows, int columns, int low, long K, const float *A, long row, long step, const float *B, Out out) {
    vec sum[ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sum[r][c] = (vec){0};
    for (long k = 0; k < K; k++) {
        vec b[COLUMNS];
        for (int c = 0; c < columns; c++) {
            b[c] = *(const vec *)(B + k * WIDTH + c * W);
            __asm__("" : "+v"(b[c])); /* lest it is loaded again for each row */
        }
        for (int r = 0; r < rows; r++) {
            vec a = (vec)_mm512_set1_ps(A[r * row + k * step]);
            for (int c = 0; c < columns; c++) sum[r][c] = times(sum[r][c], a, b[c], low);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            vec *to = (vec *)((float *)out.at + r * out.stride + c * W);
            if (!out.wide)
                narrow(sum[r][c], (uint16_t *)out.at + r * out.stride + c * W);
            else if (out.add)
                *to += sum[r][c];
            else
                *to = sum[r][c];
        }
}

INLINE void tiles(int rows, int columns, int low, long K, const float *A, long row, long step, const float *B, Out out) {
    switch (columns) {
        case 3: tile(rows, 3, low, K, A, row, step, B, out); break;
        case 2: tile(rows, 2, low, K, A, row, step, B, out); break;
        default: tile(rows, 1, low, K, A, row, step, B, out);
    }
}

/* All rows over one panel. `panel` is how far ROWS rows of the left are from the next. */
INLINE void strip(int low, long rows, int columns, long K, const float *A, long row, long step, long panel,
                  const float *B, Out out) {
    char *place = out.at;
    long below = out.stride * (out.wide ? 4 : 2);
    for (; rows >= ROWS; rows -= ROWS, A += panel, out.at = place += ROWS * below)
        tiles(ROWS, columns, low, K, A, row, step, B, out);
#define SOME(COUNT)                                               \
    if (rows & COUNT) {                                           \
        tiles(COUNT, columns, low, K, A, row, step, B, out);      \
        A += COUNT * row;                                         \
        out.at = place += COUNT * below;                          \
    }
    SOME(4) SOME(2) SOME(1)
}

static void strip_of_words(long rows, int columns, long K, const float *A, long row, long step, long panel,
                           const float *B, Out out) {
    strip(0, rows, columns, K, A, row, step, panel, B, out);
}

static void strip_of_pairs(long rows, int columns, long K, const float *A, long row, long step, long panel,
                           const float *B, Out out) {
    strip(1, rows, columns, K, A, row, step, panel, B, out);
}

/* Packs words [from, to) of the right, cut where a stretch of `deep` words ends. */
static void pack_words(const Product *y, long words, long deep, long from, long to, long room, float *packed) {
    while (from < to) {
        long begin = from / deep * deep, length = least(deep, words - begin), end = least(to, begin + length);
        if (y->low)
            pack_right(y, 1, begin, length, from, end, packed + begin * room);
        else
            pack_right(y, 0, begin, length, from, end, packed + begin * room);
        from = end;
    }
}

/* Panel `p` of the stretch that begins at word `begin`, of a right that lies turned. */
static void pack_turned(const Product *y, long p, long begin, long length, long room, float *packed) {
    long columns = least(WIDTH, y->N - p * WIDTH), stride = y->low ? y->right.stride / 2 : y->right.stride;
    const float *from = (const float *)y->right.at + p * WIDTH * stride + begin;
    turn(from, stride, columns, length, packed + begin * room + p * length * WIDTH);
}

/* Rows [m, m + rows): a stretch of K after the other, in each a panel after the other. */
static void block(const Product *y, long m, long rows, long words, long deep, long room, const float *packed,
                  float *left, float *sums) {
    long size = y->wide || !y->low ? 4 : 2;
    char *place = (char *)y->out + m * y->N * size;
    for (long begin = 0; begin < words; begin += deep) {
        long length = least(deep, words - begin), stride = y->low ? y->left.stride / 2 : y->left.stride;
        const float *A = (const float *)y->left.at + m * stride + begin;
        long row = stride, step = 1, panel = ROWS * stride;
        if (y->left.turned) {
            if (y->low)
                pack_left(y, 1, m, rows, begin, length, left);
            else
                pack_left(y, 0, m, rows, begin, length, left);
            A = left, row = 1, step = ROWS, panel = length * ROWS;
        }
        for (long n = 0; n < y->N; n += WIDTH) {
            const float *B = packed + begin * room + n * length;
            Out out = {place + n * size, y->N, size == 4, y->add || begin};
            if (sums) out = (Out){sums + n, y->N, 1, begin > 0};
            int columns = (int)(least(WIDTH, y->N - n) / W);
            (y->low ? strip_of_pairs : strip_of_words)(rows, columns, length, A, row, step, panel, B, out);
        }
    }
    if (sums)
        for (long i = 0; i < rows * y->N; i += W) narrow(*(vec *)(sums + i), (uint16_t *)place + i);
}

/* 0; 1 where there was no memory; 2 where this processor cannot. */
int multiply(const Product *y, int threads) {
#ifndef __AVX512BF16__
    if (y->low) return 2;
#endif
    long words = y->low ? (y->K + 1) / 2 : y->K, room = rounded(y->N, WIDTH), stretches = (words + DEEP - 1) / DEEP;
    long deep = (words + stretches - 1) / stretches, panels = room / WIDTH;
    int summed = stretches > 1 && y->low && !y->wide, failed = 0;
    long rows = HELD / deep / ROWS * ROWS;
    if (summed) rows = least(rows, SUMS / y->N / ROWS * ROWS);
    rows = rows < 2 * ROWS ? 2 * ROWS : rows;
    float *packed = aligned_alloc(64, words * room * 4);
    if (!packed) return 1;
#pragma omp parallel num_threads(threads)
    {
        long me = omp_get_thread_num(), all = omp_get_num_threads();
        long first = rounded(y->M * me / all, ROWS), last = least(y->M, rounded(y->M * (me + 1) / all, ROWS));
        float *left = y->left.turned ? aligned_alloc(64, rounded(rows, W) * deep * 4) : NULL;
        float *sums = summed ? aligned_alloc(64, rows * y->N * 4) : NULL;
        if ((y->left.turned && !left) || (summed && !sums)) failed = 1;
        if (y->right.turned) {
#pragma omp for schedule(static)
            for (long item = 0; item < panels * stretches; item++) {
                long begin = item / panels * deep;
                pack_turned(y, item % panels, begin, least(deep, words - begin), room, packed);
            }
        } else {
#pragma omp for schedule(static)
            for (long from = 0; from < words; from += ROWS)
                pack_words(y, words, deep, from, least(words, from + ROWS), room, packed);
        }
        for (long m = first; m < last && !failed; m += rows)
            block(y, m, least(rows, last - m), words, deep, room, packed, left, sums);
        free(left);
        free(sums);
    }
    free(packed);
    return failed;
}

#else

int multiply(const Product *y, int threads) { return 2; }

#endif
