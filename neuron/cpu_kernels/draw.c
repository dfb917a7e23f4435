/* Sampling of a token from a row of logits.
 *
 *     x[i] = cap tanh(logit[i] / cap) with a cap;  w[i] = exp((x[i] - max x) / temperature)
 *
 * The rest is as neuron.triton_kernels.sampling defines a draw. Nothing is sorted: each filter is a least weight, found by
 * partition among a few candidates.
 */
#include "kernels.h"
#include "simd.h"

enum { CHUNK = 256 };

/* Weights under these, in turn, are left out of a search: a thousandth of the likeliest mostly suffices. */
static const float CUTS[] = {0x1p-10f, 0x1p-20f, 0.0f};

/* The largest of n logits, or NaN if one of them is not finite. */
static float largest(const float *x, int n) {
    vf most = vf_set1(x[0]), odd = vf_zero();
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        vf lanes = vf_load(x + i);
        most = vf_max(most, lanes);
        odd = vf_add(odd, vf_mul(lanes, vf_zero()));
    }
    float found = vf_reduce_max(most), rest = vf_sum(odd);
    for (; i < n; i++) {
        if (x[i] > found) found = x[i];
        rest += x[i] * 0.0f;
    }
    /* Zero times a finite number is zero, times any other NaN. */
    return found + rest;
}

static double sum_of(const float *weights, int n, float least) {
    float lanes[16] = {0};
    double sum = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += weights[i + j] >= least ? weights[i + j] : 0.0f;
    for (int j = 0; j < 16; j++) sum += (double)lanes[j];
    for (; i < n; i++)
        if (weights[i] >= least) sum += (double)weights[i];
    return sum;
}

static double total_of(const float *weights, int n, float least) {
    double total = 0;
    for (int i = 0; i < n; i += CHUNK) total += sum_of(weights + i, n - i < CHUNK ? n - i : CHUNK, least);
    return total;
}

/* Copy the weights that are at least `least`; returns their number. */
static int gather(const float *weights, int n, float least, float *to) {
    int count = 0;
    for (int i = 0; i < n; i += 64) {
        int end = n - i < 64 ? n - i : 64;
        if (end == 64) {
            vf most = vf_max(vf_max(vf_load(weights + i), vf_load(weights + i + 16)),
                             vf_max(vf_load(weights + i + 32), vf_load(weights + i + 48)));
            if (vf_reduce_max(most) < least) continue;
        }
        for (int j = i; j < i + end; j++)
            if (weights[j] >= least) to[count++] = weights[j];
    }
    return count;
}

/* The weight with which the running sum of weights[n], from the largest down, reaches `target`; 0 if none does. With
 * `by_count` each counts as one. Reorders them: a search by partition (Hoare's) that goes on with one side only. */
static float weight_at(float *weights, int n, double target, int by_count) {
    double before = 0;
    while (n > 0) {
        float a = weights[0], b = weights[n / 2], c = weights[n - 1];
        float low = a < b ? a : b, high = a < b ? b : a, pivot = c < low ? low : c > high ? high : c;
        double above = 0;
        int larger = 0, smaller = n;
        for (int i = 0; i < smaller;) {
            float w = weights[i];
            if (w > pivot) {
                weights[i++] = weights[larger];
                weights[larger++] = w;
                above += by_count ? 1.0 : (double)w;
            } else if (w < pivot) {
                weights[i] = weights[--smaller];
                weights[smaller] = w;
            } else {
                i++;
            }
        }
        double equal = (double)(smaller - larger) * (by_count ? 1.0 : (double)pivot);
        if (before + above >= target) {
            n = larger;
        } else if (before + above + equal >= target) {
            return pivot;
        } else {
            before += above + equal;
            weights += smaller;
            n -= smaller;
        }
    }
    return 0;
}

/* The same among weights of at least `least`, which are copied to `scratch` [n]; `least` if they do not suffice. */
static float search(const float *weights, int n, float least, double target, int by_count, float *scratch) {
    for (int i = 0;; i++) {
        float cut = CUTS[i] > least ? CUTS[i] : least;
        int count = gather(weights, n, cut, scratch);
        double reached = by_count ? count : total_of(scratch, count, 0);
        if (reached >= target) return weight_at(scratch, count, target, by_count);
        if (CUTS[i] <= least) return least; /* all of them do not suffice */
    }
}

int32_t LEVEL(draw)(float *logits, int n, const struct draw *draw, float *scratch) {
    float most = largest(logits, n);
    if (most != most) return -1;
    if (draw->temperature == 0) {
        int32_t first = 0;
        while (logits[first] != most) first++;
        return first;
    }
    if (draw->cap != 0) {
        /* tanh(z) = 1 - 2 / (exp(2 z) + 1) */
        vf cap = vf_set1(draw->cap), twice = vf_set1(2.0f / draw->cap), one = vf_set1(1.0f);
        for (int i = 0; i < n; i += 16) {
            vf quotient = vf_div(vf_set1(2.0f), vf_add(vf_exp(vf_mul(vf_load(logits + i), twice)), one));
            vf_store(logits + i, vf_mul(cap, vf_sub(one, quotient)));
        }
        most = largest(logits, n);
    }
    vf scale = vf_set1(1.0f / draw->temperature), by = vf_set1(most);
    for (int i = 0; i < n; i += 16) /* rows are padded to whole registers */
        vf_store(logits + i, vf_exp(vf_mul(vf_sub(vf_load(logits + i), by), scale)));
    const float *weights = logits;
    /* The likeliest has weight 1, which is never dropped; below this are results of vf_exp that should be zero. */
    float least = 0x1p-120f;
    if (draw->top_k > 0 && draw->top_k < n) least = search(weights, n, least, draw->top_k, 1, scratch);
    if (draw->top_p < 1) {
        double target = draw->top_p * total_of(weights, n, least);
        float found = search(weights, n, least, target > 1e-30 ? target : 1e-30, 0, scratch);
        if (found > least) least = found;
    }
    if (draw->min_p > least) least = draw->min_p;
    if (least > 1) least = 1;
    double target = draw->uniform * total_of(weights, n, least), running = 0;
    int32_t last = 0;
    for (int start = 0; start < n; start += CHUNK) {
        int end = n - start < CHUNK ? n : start + CHUNK;
        double sum = sum_of(weights + start, end - start, least), within = running;
        running += sum;
        if (sum == 0) continue;
        for (int i = start; i < end && running > target; i++) {
            if (weights[i] < least) continue;
            last = i;
            within += (double)weights[i];
            if (within > target) return i;
        }
        if (running > target) return last; /* rounding: its last one */
    }
    return last;
}
