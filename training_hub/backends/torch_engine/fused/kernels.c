/* The parts of a training step on a CPU that are not matrix products of a whole pack, each in one pass over memory.
 *
 * Built at first use by build.py for the processor at hand. Tensors are float32 or bfloat16 (`low` is 1); everything
 * inside is float32. No sum depends on the number of threads, so neither does any bit of a result.
 *
 * T tokens, D width of queries and keys, E width of values, L tokens of one document, P its number rounded up
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { W = 16, COLUMNS = 4, ROWS = 6 };
#elif defined(__AVX2__)
enum { W = 8, COLUMNS = 2, ROWS = 6 };
#else
enum { W = 4, COLUMNS = 4, ROWS = 6 };
#endif
typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE long rounded(long n) { return (n + W - 1) / W * W; }

INLINE float widen(uint16_t low) {
    union { uint32_t bits; float number; } to = {(uint32_t)low << 16};
    return to.number;
}

/* To the nearest, ties to even; what is not a number stays so. */
INLINE uint16_t narrow(float number) {
    union { float number; uint32_t bits; } from = {number};
    uint32_t up = from.bits + 0x7fff + ((from.bits >> 16) & 1);
    return number == number ? up >> 16 : 0x7fc0;
}

/* n numbers at place `at` of a tensor, as float32 and times `factor`; and back. */
INLINE void take(const void *tensor, int low, long at, long n, float factor, float *restrict out) {
    if (low) {
        const uint16_t *from = (const uint16_t *)tensor + at;
        for (long i = 0; i < n; i++) out[i] = widen(from[i]) * factor;
    } else {
        const float *from = (const float *)tensor + at;
        for (long i = 0; i < n; i++) out[i] = from[i] * factor;
    }
}

INLINE void give(void *tensor, int low, long at, long n, const float *restrict from) {
    if (low) {
        uint16_t *out = (uint16_t *)tensor + at;
        for (long i = 0; i < n; i++) out[i] = narrow(from[i]);
    } else {
        memcpy((float *)tensor + at, from, n * sizeof(float));
    }
}

/* e^x to 2e-7 for x <= 0 and up to 88; written without branches, so that compilers make vectors of it. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.98756915e-4f;
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345191e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float number; } power = {((int32_t)n + 127) * (1 << 23)};
    return p * power.number;
}

/* The natural logarithm to 1e-7 for x > 0 that is not subnormal; without branches, too. */
INLINE float logarithm(float x) {
    union { float number; int32_t bits; } from = {x};
    int32_t n = (from.bits - 0x3f3504f3) >> 23; /* so that what is left lies between sqrt(1/2) and sqrt(2) */
    from.bits -= n * (1 << 23);
    float r = from.number - 1.0f, square = r * r;
    float p = 7.0376836292e-2f;
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    return r - 0.5f * square + p * r * square + (float)n * 0.69314718f;
}

INLINE float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* ---- small matrix products ------------------------------------------------------------------------------------- */

/* One tile: C[rows][columns * W] = A B, or += where `add`. A[r][k] stands at r * ar + k * ak. */
INLINE void tile(int rows, int columns, long K, const float *A, long ar, long ak, const float *B, long ldb, float *C,
                 long ldc, int add) {
    vec sum[ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sum[r][c] = add ? *(const vec *)(C + r * ldc + c * W) : (vec){0};
    for (long k = 0; k < K; k++) {
        vec b[COLUMNS];
        for (int c = 0; c < columns; c++) b[c] = *(const vec *)(B + k * ldb + c * W);
        for (int r = 0; r < rows; r++) {
            float a = A[r * ar + k * ak];
            for (int c = 0; c < columns; c++) sum[r][c] += a * b[c];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) *(vec *)(C + r * ldc + c * W) = sum[r][c];
}

#define BY_ROWS(COUNT)                                                                  \
    switch (rows) {                                                                     \
        case 6: tile(6, COUNT, K, A, ar, ak, B, ldb, C, ldc, add); break;               \
        case 5: tile(5, COUNT, K, A, ar, ak, B, ldb, C, ldc, add); break;               \
        case 4: tile(4, COUNT, K, A, ar, ak, B, ldb, C, ldc, add); break;               \
        case 3: tile(3, COUNT, K, A, ar, ak, B, ldb, C, ldc, add); break;               \
        case 2: tile(2, COUNT, K, A, ar, ak, B, ldb, C, ldc, add); break;               \
        default: tile(1, COUNT, K, A, ar, ak, B, ldb, C, ldc, add); break;              \
    }

static void strip(int rows, int columns, long K, const float *A, long ar, long ak, const float *B, long ldb, float *C,
                  long ldc, int add) {
    switch (columns) {
#if !defined(__AVX2__) || defined(__AVX512F__)
        case 4: BY_ROWS(4) break;
        case 3: BY_ROWS(3) break;
#endif
        case 2: BY_ROWS(2) break;
        default: BY_ROWS(1) break;
    }
}

/* C[M][N] = A[M][K] B[K][N], or += where `add`; N is a multiple of W. */
static void product(long M, long N, long K, const float *A, long ar, long ak, const float *B, long ldb, float *C,
                    long ldc, int add) {
    for (long n = 0; n < N; n += COLUMNS * W) {
        long left = (N - n) / W;
        int columns = left < COLUMNS ? (int)left : COLUMNS;
        for (long m = 0; m < M; m += ROWS) {
            int rows = M - m < ROWS ? (int)(M - m) : ROWS;
            strip(rows, columns, K, A + m * ar, ar, ak, B + n, ldb, C + m * ldc + n, ldc, add);
        }
    }
}

/* ---- causal attention inside each document --------------------------------------------------------------------- */

enum { BLOCK = 24 }; /* queries whose scores are held at once */

typedef struct {
    const void *at;
    long token, head; /* elements from one token, one head, to the next */
} Heads;

typedef struct {
    int low;
    long heads, kv_heads, D, E, documents, window;
    const int64_t *starts, *order; /* starts[documents + 1]; order: the longest document first */
    float scale;
} Layer;

/* Document's head as rows[P][width rounded up] and, where `across` is not null, as across[width rounded up][P]. */
static void unpack(Heads from, int low, long head, long start, long L, long width, float factor, float *rows,
                   float *across) {
    long wide = rounded(width), P = rounded(L);
    memset(rows, 0, P * wide * sizeof(float));
    for (long t = 0; t < L; t++)
        take(from.at, low, (start + t) * from.token + head * from.head, width, factor, rows + t * wide);
    if (!across) return;
    for (long d = 0; d < wide; d++)
        for (long t = 0; t < P; t++) across[d * P + t] = rows[t * wide + d];
}

/* Where the keys seen by queries first .. first + count begin and end; the beginning is a multiple of W. */
INLINE long seen_from(const Layer *y, long first) {
    long from = y->window > 0 && first >= y->window ? first - y->window + 1 : 0;
    return from / W * W;
}

/* The first key that query `i` sees, counted from `from`. */
INLINE long hidden_before(const Layer *y, long i, long from) {
    long first = y->window > 0 && i >= y->window ? i - y->window + 1 : 0;
    return first > from ? first - from : 0;
}

static void document_forward(const Layer *y, Heads q, Heads k, Heads v, void *out, float *lse, long start, long L,
                             long total, long kv_head, float *room) {
    long D = rounded(y->D), E = rounded(y->E), P = rounded(L), group = y->heads / y->kv_heads;
    float *keys_DP = room, *rows = keys_DP + D * P, *values = rows + P * D, *queries = values + P * E;
    float *scores = queries + P * D, *result = scores + BLOCK * P;
    unpack(k, y->low, kv_head, start, L, y->D, 1.0f, rows, keys_DP);
    unpack(v, y->low, kv_head, start, L, y->E, 1.0f, values, NULL);
    for (long head = kv_head * group; head < (kv_head + 1) * group; head++) {
        unpack(q, y->low, head, start, L, y->D, y->scale, queries, NULL);
        for (long first = 0; first < L; first += BLOCK) {
            long count = L - first < BLOCK ? L - first : BLOCK, from = seen_from(y, first);
            long span = rounded(first + count) - from;
            float inverse[BLOCK];
            product(count, span, D, queries + first * D, D, 1, keys_DP + from, P, scores, P, 0);
            for (long r = 0; r < count; r++) {
                float *row = scores + r * P, most = -INFINITY, sum = 0;
                long begin = hidden_before(y, first + r, from), end = first + r + 1 - from;
#pragma omp simd reduction(max : most)
                for (long j = begin; j < end; j++) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : sum)
                for (long j = begin; j < end; j++) {
                    row[j] = exponential(row[j] - most);
                    sum += row[j];
                }
                memset(row, 0, begin * sizeof(float));
                memset(row + end, 0, (span - end) * sizeof(float));
                inverse[r] = 1.0f / sum;
                lse[head * total + start + first + r] = most + logf(sum);
            }
            product(count, E, span, scores, P, 1, values + from * E, E, result, E, 0);
            for (long r = 0; r < count; r++) {
                for (long e = 0; e < y->E; e++) result[r * E + e] *= inverse[r];
                give(out, y->low, ((start + first + r) * y->heads + head) * y->E, y->E, result + r * E);
            }
        }
    }
}

static void document_backward(const Layer *y, Heads q, Heads k, Heads v, Heads upstream, const float *lse, void *dq,
                              void *dk, void *dv, long start, long L, long total, long kv_head, float *room) {
    long D = rounded(y->D), E = rounded(y->E), P = rounded(L), group = y->heads / y->kv_heads;
    float *keys = room, *keys_DP = keys + P * D, *values_EP = keys_DP + P * D, *dkeys = values_EP + P * E;
    float *dvalues = dkeys + P * D, *queries = dvalues + P * E, *ups = queries + P * D, *shares = ups + P * E;
    float *slopes = shares + BLOCK * P, *result = slopes + BLOCK * P;
    unpack(k, y->low, kv_head, start, L, y->D, 1.0f, keys, keys_DP);
    unpack(v, y->low, kv_head, start, L, y->E, 1.0f, dvalues, values_EP);
    memset(dkeys, 0, P * D * sizeof(float));
    memset(dvalues, 0, P * E * sizeof(float));
    for (long head = kv_head * group; head < (kv_head + 1) * group; head++) {
        unpack(q, y->low, head, start, L, y->D, y->scale, queries, NULL);
        unpack(upstream, y->low, head, start, L, y->E, 1.0f, ups, NULL);
        for (long first = 0; first < L; first += BLOCK) {
            long count = L - first < BLOCK ? L - first : BLOCK, from = seen_from(y, first);
            long span = rounded(first + count) - from;
            product(count, span, D, queries + first * D, D, 1, keys_DP + from, P, shares, P, 0);
            product(count, span, E, ups + first * E, E, 1, values_EP + from, P, slopes, P, 0);
            for (long r = 0; r < count; r++) {
                float *share = shares + r * P, *slope = slopes + r * P, mean = 0;
                float normaliser = lse[head * total + start + first + r];
                long begin = hidden_before(y, first + r, from), end = first + r + 1 - from;
#pragma omp simd reduction(+ : mean)
                for (long j = begin; j < end; j++) {
                    share[j] = exponential(share[j] - normaliser);
                    mean += share[j] * slope[j];
                }
                for (long j = begin; j < end; j++) slope[j] = share[j] * (slope[j] - mean);
                memset(share, 0, begin * sizeof(float));
                memset(slope, 0, begin * sizeof(float));
                memset(share + end, 0, (span - end) * sizeof(float));
                memset(slope + end, 0, (span - end) * sizeof(float));
            }
            product(count, D, span, slopes, P, 1, keys + from * D, D, result, D, 0);
            for (long r = 0; r < count; r++) {
                for (long d = 0; d < y->D; d++) result[r * D + d] *= y->scale;
                give(dq, y->low, ((start + first + r) * y->heads + head) * y->D, y->D, result + r * D);
            }
            product(span, D, count, slopes, 1, P, queries + first * D, D, dkeys + from * D, D, 1);
            product(span, E, count, shares, 1, P, ups + first * E, E, dvalues + from * E, E, 1);
        }
    }
    for (long t = 0; t < L; t++) {
        give(dk, y->low, ((start + t) * y->kv_heads + kv_head) * y->D, y->D, dkeys + t * D);
        give(dv, y->low, ((start + t) * y->kv_heads + kv_head) * y->E, y->E, dvalues + t * E);
    }
}

static int each_document(const Layer *y, Heads q, Heads k, Heads v, void *out, float *lse, const Heads *upstream,
                         void *dq, void *dk, void *dv, int threads) {
    long total = y->starts[y->documents], longest = y->order[0];
    long P = rounded(y->starts[longest + 1] - y->starts[longest]), wide = rounded(y->D) + rounded(y->E);
    size_t floats = 4 * P * wide + 2 * BLOCK * P + BLOCK * wide;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *room = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (!room) failed = 1;
#pragma omp for schedule(dynamic)
        for (long item = 0; item < y->documents * y->kv_heads; item++) {
            long document = y->order[item / y->kv_heads], head = item % y->kv_heads;
            long start = y->starts[document], L = y->starts[document + 1] - start;
            if (!room) continue;
            if (upstream)
                document_backward(y, q, k, v, *upstream, lse, dq, dk, dv, start, L, total, head, room);
            else
                document_forward(y, q, k, v, out, lse, start, L, total, head, room);
        }
        free(room);
    }
    return failed;
}

/* out [T, heads, E], lse [heads, T]; 1 where there was no memory. */
int attention_forward(const Layer *y, const Heads *q, const Heads *k, const Heads *v, void *out, float *lse,
                      int threads) {
    return each_document(y, *q, *k, *v, out, lse, NULL, NULL, NULL, NULL, threads);
}

/* dq [T, heads, D], dk [T, kv_heads, D], dv [T, kv_heads, E]; 1 where there was no memory. */
int attention_backward(const Layer *y, const Heads *q, const Heads *k, const Heads *v, const Heads *upstream,
                       float *lse, void *dq, void *dk, void *dv, int threads) {
    return each_document(y, *q, *k, *v, NULL, lse, upstream, dq, dk, dv, threads);
}

/* ---- root mean square norm: y = x / rms(x) * (weight + offset) -------------------------------------------------- */

enum { CHUNK = 64 }; /* rows whose gradient of the weight is added up before it meets the others */

/* One row over itself; gives 1 / rms of what it was. */
INLINE float normed(float *restrict row, const float *restrict scale, long D, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long d = 0; d < D; d++) sum += row[d] * row[d];
    float by = 1.0f / sqrtf(sum / D + eps);
    for (long d = 0; d < D; d++) row[d] *= by * scale[d];
    return by;
}

void rms_norm_forward(const void *x, const void *weight, void *y, float *inverse, int low, long T, long D, float eps,
                      float offset, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float row[D], scale[D];
        take(weight, low, 0, D, 1.0f, scale);
        for (long d = 0; d < D; d++) scale[d] += offset;
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) {
            take(x, low, t * D, D, 1.0f, row);
            inverse[t] = normed(row, scale, D, eps);
            give(y, low, t * D, D, row);
        }
    }
}

/* sum = x + delta, rounded as the tensors are, and y its norm. */
void add_norm_forward(const void *x, const void *delta, const void *weight, void *sum, void *y, float *inverse, int low,
                      long T, long D, float eps, float offset, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float row[D], more[D], scale[D];
        take(weight, low, 0, D, 1.0f, scale);
        for (long d = 0; d < D; d++) scale[d] += offset;
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) {
            take(x, low, t * D, D, 1.0f, row);
            take(delta, low, t * D, D, 1.0f, more);
            for (long d = 0; d < D; d++) row[d] += more[d];
            give(sum, low, t * D, D, row);
            if (low) take(sum, low, t * D, D, 1.0f, row);
            inverse[t] = normed(row, scale, D, eps);
            give(y, low, t * D, D, row);
        }
    }
}

/* beside: a gradient of x that went around the norm, or NULL. dx: both together.
 * partial [ceil(T / CHUNK), D]: the gradient of the weight, to be added up. */
void rms_norm_backward(const void *dy, const void *beside, const void *x, const void *weight, const float *inverse,
                       void *dx, float *partial, int low, long T, long D, float offset, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float row[D], up[D], scale[D];
        take(weight, low, 0, D, 1.0f, scale);
        for (long d = 0; d < D; d++) scale[d] += offset;
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < (T + CHUNK - 1) / CHUNK; chunk++) {
            float *sums = partial + chunk * D;
            memset(sums, 0, D * sizeof(float));
            for (long t = chunk * CHUNK; t < T && t < (chunk + 1) * CHUNK; t++) {
                float along = 0, by = inverse[t];
                take(x, low, t * D, D, by, row);
                take(dy, low, t * D, D, 1.0f, up);
                for (long d = 0; d < D; d++) sums[d] += up[d] * row[d];
#pragma omp simd reduction(+ : along)
                for (long d = 0; d < D; d++) {
                    up[d] *= scale[d];
                    along += up[d] * row[d];
                }
                along /= D;
                for (long d = 0; d < D; d++) up[d] = (up[d] - row[d] * along) * by;
                if (beside) {
                    take(beside, low, t * D, D, 1.0f, row);
                    for (long d = 0; d < D; d++) up[d] += row[d];
                }
                give(dx, low, t * D, D, up);
            }
        }
    }
}

/* ---- gated linear unit: h = gate * logistic(gate) * up ---------------------------------------------------------- */

enum { STRETCH = 1024 };

void swiglu_forward(const void *gate, const void *up, void *h, int low, long n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long at = 0; at < n; at += STRETCH) {
        float g[STRETCH], u[STRETCH];
        long count = n - at < STRETCH ? n - at : STRETCH;
        take(gate, low, at, count, 1.0f, g);
        take(up, low, at, count, 1.0f, u);
        for (long i = 0; i < count; i++) g[i] = g[i] * logistic(g[i]) * u[i];
        give(h, low, at, count, g);
    }
}

void swiglu_backward(const void *dh, const void *gate, const void *up, void *dgate, void *dup, int low, long n,
                     int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long at = 0; at < n; at += STRETCH) {
        float g[STRETCH], u[STRETCH], d[STRETCH];
        long count = n - at < STRETCH ? n - at : STRETCH;
        take(gate, low, at, count, 1.0f, g);
        take(up, low, at, count, 1.0f, u);
        take(dh, low, at, count, 1.0f, d);
        for (long i = 0; i < count; i++) {
            float s = logistic(g[i]), silu = g[i] * s;
            g[i] = d[i] * u[i] * (s + silu * (1.0f - s));
            u[i] = d[i] * silu;
        }
        give(dgate, low, at, count, g);
        give(dup, low, at, count, u);
    }
}

/* ---- rotary positions: each half of a head turned by the other -------------------------------------------------- */

/* x, y [T, heads, D]; cos, sin [T, D]. back: the gradient of x from that of y. */
void rotate(const void *x, const void *cosines, const void *sines, void *y, int low, long T, long heads, long D,
            int back, int threads) {
    long half = D / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < T; t++) {
        float row[D], turned[D], c[D], s[D];
        take(cosines, low, t * D, D, 1.0f, c);
        take(sines, low, t * D, D, 1.0f, s);
        for (long head = 0; head < heads; head++) {
            long at = (t * heads + head) * D;
            take(x, low, at, D, 1.0f, row);
            for (long i = 0; i < half; i++) {
                float cross = back ? row[i + half] * s[i + half] : -row[i + half] * s[i];
                float other = back ? -row[i] * s[i] : row[i] * s[i + half];
                turned[i] = row[i] * c[i] + cross;
                turned[i + half] = row[i + half] * c[i + half] + other;
            }
            give(y, low, at, D, turned);
        }
    }
}

/* ---- cross-entropy of rows of logits, and its gradient over them ------------------------------------------------ */

/* logits [R, V] become the gradient of the sum of losses [R] over what they were before the multiplier:
 * weight * (share * ((1 - smoothing) * -log p(target) + smoothing * mean of -log p) + z * log(sum of e^logit)^2),
 * where share is p(target), taken as a constant, with dft, and 1 without. */
void cross_entropy(void *logits, const int64_t *targets, const float *weights, float *losses, int low, long R, long V,
                   float multiplier, float smoothing, float z, int dft, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *row = malloc(V * sizeof(float));
#pragma omp for schedule(static)
        for (long r = 0; r < R; r++) {
            float most = -INFINITY, sum = 0, mean = 0;
            if (!row) {
                losses[r] = NAN;
                continue;
            }
            take(logits, low, r * V, V, multiplier, row);
#pragma omp simd reduction(max : most)
            for (long i = 0; i < V; i++) most = row[i] > most ? row[i] : most;
            float chosen = row[targets[r]] - most;
            if (smoothing > 0) {
#pragma omp simd reduction(+ : mean)
                for (long i = 0; i < V; i++) mean += row[i] - most;
                mean /= V;
            }
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < V; i++) {
                row[i] = exponential(row[i] - most);
                sum += row[i];
            }
            float above = logf(sum), normaliser = most + above, loss = above - chosen, up = weights[r] * multiplier;
            float share = dft ? expf(-loss) : 1.0f;
            loss = (1.0f - smoothing) * loss + smoothing * (above - mean);
            losses[r] = weights[r] * (share * loss + z * normaliser * normaliser);
            float factor = up * (share + 2.0f * z * normaliser) / sum, flat = up * share * smoothing / V;
            for (long i = 0; i < V; i++) row[i] = row[i] * factor - flat;
            row[targets[r]] -= up * share * (1.0f - smoothing);
            give(logits, low, r * V, V, row);
        }
        free(row);
    }
}

/* ---- distillation: how far rows of logits are from a teacher's, and the gradient over them ----------------------- */

enum { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, DRAWN };
#define LEAST -1e4f /* a logarithm below it is taken for it, so that a probability of 0 times its logarithm is 0 */

INLINE float largest(const float *row, long n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (long i = 0; i < n; i++) most = row[i] > most ? row[i] : most;
    return most;
}

/* row[i] becomes the logarithm of softmax(row * by). */
INLINE void log_softmax(const float *from, float *row, long n, float by) {
    float most = largest(from, n), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) {
        row[i] = (from[i] - most) * by;
        sum += exponential(row[i]);
    }
    float normaliser = logf(sum);
    for (long i = 0; i < n; i++) {
        float value = row[i] - normaliser;
        row[i] = value < LEAST ? LEAST : value;
    }
}

/* The divergence of distribution p from q, given by their logarithms; q becomes its gradient by q's logits, p is lost. */
INLINE float divergence_of(float *p, float *q, long n, int kind, float beta) {
    float value = 0, mean = 0;
    if (kind == FORWARD_KL) {
#pragma omp simd reduction(+ : value)
        for (long i = 0; i < n; i++) {
            float share = exponential(p[i]);
            value += share * (p[i] - q[i]);
            q[i] = exponential(q[i]) - share;
        }
        return value;
    }
    if (kind == REVERSE_KL) {
#pragma omp simd reduction(+ : mean)
        for (long i = 0; i < n; i++) {
            float share = exponential(q[i]);
            p[i] = q[i] - p[i];
            q[i] = share;
            mean += share * p[i];
        }
    } else {
#pragma omp simd reduction(+ : value, mean)
        for (long i = 0; i < n; i++) {
            float theirs = exponential(p[i]), share = exponential(q[i]);
            float middle = logarithm(beta * theirs + (1.0f - beta) * share);
            value += theirs * (p[i] - middle);
            p[i] = q[i] - middle;
            q[i] = share;
            mean += share * p[i];
        }
    }
    float by = kind == REVERSE_KL ? 1.0f : 1.0f - beta;
    for (long i = 0; i < n; i++) q[i] *= by * (p[i] - mean);
    return kind == REVERSE_KL ? mean : beta * value + (1.0f - beta) * mean;
}

/* The loss of a row, of which scale * value is known already, and its gradient into logits [R, V]: `over` that of the
 * value over the first C entries, times the temperature; s the row's logits, multiplied. */
INLINE void finish_row(void *logits, int low, long r, float *s, const float *over, long V, long C, int64_t target,
                       float weight, float multiplier, float temperature, float alpha, float value, float *loss) {
    float rest = 1.0f - alpha, up = weight * multiplier, both = alpha * temperature * up;
    *loss = weight * alpha * temperature * temperature * value;
    if (rest > 0) {
        float most = largest(s, V), sum = 0, chosen = s[target] - most;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < V; i++) {
            s[i] = exponential(s[i] - most);
            sum += s[i];
        }
        *loss += weight * rest * (logf(sum) - chosen);
        float factor = rest * up / sum;
        for (long i = 0; i < V; i++) s[i] *= factor;
        s[target] -= rest * up;
    } else {
        memset(s, 0, V * sizeof(float));
    }
    for (long i = 0; i < C; i++) s[i] += both * over[i];
    give(logits, low, r * V, V, s);
}

/* logits [R, V] become the gradient of the sum of losses [R]; teacher [R, across], of which the first C entries count. */
void divergence(void *logits, const void *teacher, const int64_t *targets, const float *weights, float *losses, int low,
                long R, long V, long across, long C, int teacher_low, float multiplier, float teacher_multiplier,
                int kind, float beta, float temperature, float alpha, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *s = malloc((V + 2 * C) * sizeof(float)), *p = s + V, *q = p + C;
#pragma omp for schedule(static)
        for (long r = 0; r < R; r++) {
            if (!s) {
                losses[r] = NAN;
                continue;
            }
            take(logits, low, r * V, V, multiplier, s);
            take(teacher, teacher_low, r * across, C, teacher_multiplier, q);
            log_softmax(q, p, C, 1.0f / temperature);
            log_softmax(s, q, C, 1.0f / temperature);
            float value = divergence_of(p, q, C, kind, beta);
            finish_row(logits, low, r, s, q, V, C, targets[r], weights[r], multiplier, temperature, alpha, value,
                       losses + r);
        }
        free(s);
    }
}

/* The same against K entries of the teacher for each row: ids [R, K], logs [R, K] their log-probabilities, and last
 * [R] the mass of all others, less than 0 where there are none. Or, DRAWN, ids that were drawn from it, and last its
 * entropy. */
void bucket_divergence(void *logits, const int64_t *ids, const float *logs, const float *last, const int64_t *targets,
                       const float *weights, float *losses, int low, long R, long V, long C, long K, float multiplier,
                       int kind, float beta, float temperature, float alpha, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *s = malloc((V + C + 2 * (K + 1)) * sizeof(float)), *q = s + V, *p_B = q + C, *q_B = p_B + K + 1;
#pragma omp for schedule(static)
        for (long r = 0; r < R; r++) {
            const int64_t *chosen = ids + r * K;
            int has_tail = last[r] >= 0;
            float value = 0, others = 0;
            if (!s) {
                losses[r] = NAN;
                continue;
            }
            take(logits, low, r * V, V, multiplier, s);
            log_softmax(s, q, C, 1.0f / temperature);
            if (kind == DRAWN) {
                for (long k = 0; k < K; k++) value -= q[chosen[k]] / K;
                for (long i = 0; i < C; i++) q[i] = exponential(q[i]);
                for (long k = 0; k < K; k++) q[chosen[k]] -= 1.0f / K;
                value -= last[r];
            } else {
                for (long k = 0; k < K; k++) {
                    p_B[k] = logs[r * K + k];
                    q_B[k] = q[chosen[k]];
                }
                for (long k = 0; k < K; k++) q[chosen[k]] = -INFINITY;
#pragma omp simd reduction(+ : others)
                for (long i = 0; i < C; i++) {
                    q[i] = q[i] < LEAST ? 0.0f : exponential(q[i]);
                    others += q[i];
                }
                others = others < 1.1754944e-38f ? 1.1754944e-38f : others;
                p_B[K] = logf(last[r] < 1.1754944e-38f ? 1.1754944e-38f : last[r]);
                q_B[K] = logf(others);
                value = divergence_of(p_B, q_B, K + has_tail, kind, beta);
                float by = has_tail ? q_B[K] / others : 0.0f;
                for (long i = 0; i < C; i++) q[i] *= by;
                for (long k = 0; k < K; k++) q[chosen[k]] = q_B[k];
            }
            finish_row(logits, low, r, s, q, V, C, targets[r], weights[r], multiplier, temperature, alpha, value,
                       losses + r);
        }
        free(s);
    }
}
