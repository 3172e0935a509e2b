/* LASER attention in double precision, forward alone: reads one exported problem, writes its results beside it.
   Covers plain and causal problems of float32 with grouped heads; anything else is refused with exit code 3. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static float *load(const char *folder, const char *name, size_t count) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.bin", folder, name);
    FILE *file = fopen(path, "rb");
    float *x = malloc(count * sizeof *x + 1);
    if (!file || fread(x, sizeof *x, count, file) != count) exit(2);
    fclose(file);
    return x;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    char path[4096], line[512], dtype[32] = "", causal[32] = "0";
    long batch = 1, hq = 0, hkv = 0, lq = 0, lk = 0, d = 0, e = 0, lse_wanted = 0;
    double scale = 1, beta = 1;
    snprintf(path, sizeof path, "%s/problem.txt", argv[1]);
    FILE *file = fopen(path, "r");
    if (!file) return 2;
    while (fgets(line, sizeof line, file)) {
        sscanf(line, "dtype %31s", dtype);
        sscanf(line, "batch %ld", &batch);
        sscanf(line, "sizes %ld %ld %ld %ld %ld %ld", &hq, &hkv, &lq, &lk, &d, &e);
        sscanf(line, "scale %lf", &scale);
        sscanf(line, "beta %lf", &beta);
        sscanf(line, "is_causal %31s", causal);
        sscanf(line, "return_lse %ld", &lse_wanted);
        if (!strncmp(line, "gradients 1", 11) || !strncmp(line, "window_size", 11)) return 3;
    }
    fclose(file);
    if (strcmp(dtype, "float32") || beta == 0) return 3;
    long offset = !strcmp(causal, "bottom_right") ? lk - lq : 0, free_view = !strcmp(causal, "0");

    float *q = load(argv[1], "query", batch * hq * lq * d);
    float *k = load(argv[1], "key", batch * hkv * lk * d);
    float *v = load(argv[1], "value", batch * hkv * lk * e);
    float *out = malloc(batch * hq * lq * e * sizeof *out + 1), *lse = malloc(batch * hq * lq * sizeof *lse + 1);
    double *s = malloc((lk + 1) * sizeof *s);
    for (long b = 0; b < batch; b++)
        for (long h = 0; h < hq; h++)
            for (long i = 0; i < lq; i++) {
                const float *kh = k + (b * hkv + h / (hq / hkv)) * lk * d, *vh = v + (b * hkv + h / (hq / hkv)) * lk * e;
                long row = (b * hq + h) * lq + i, seen = free_view ? lk : i + offset + 1;
                if (seen > lk) seen = lk;
                double m = -INFINITY, total = 0;
                for (long j = 0; j < seen; j++) {
                    s[j] = 0;
                    for (long x = 0; x < d; x++) s[j] += (double)q[row * d + x] * kh[j * d + x];
                    s[j] *= scale;
                    if (s[j] > m) m = s[j];
                }
                for (long j = 0; j < seen; j++) total += exp(s[j] - m);
                double l = m + log(total);
                lse[row] = seen > 0 ? (float)l : -INFINITY;
                for (long x = 0; x < e; x++) {
                    double top = -INFINITY, sum = 0;
                    for (long j = 0; j < seen; j++)
                        if (s[j] + beta * vh[j * e + x] > top) top = s[j] + beta * vh[j * e + x];
                    for (long j = 0; j < seen; j++) sum += exp(s[j] + beta * vh[j * e + x] - top);
                    out[row * e + x] = seen > 0 ? (float)((top + log(sum) - l) / beta) : 0;
                }
            }
    snprintf(path, sizeof path, "%s/result.out.bin", argv[1]);
    file = fopen(path, "wb");
    fwrite(out, sizeof *out, batch * hq * lq * e, file);
    fclose(file);
    if (lse_wanted) {
        snprintf(path, sizeof path, "%s/result.lse.bin", argv[1]);
        file = fopen(path, "wb");
        fwrite(lse, sizeof *lse, batch * hq * lq, file);
        fclose(file);
    }
    return 0;
}
