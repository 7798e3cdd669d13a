/* Runs the row kernels for another process: requests on stdin, answers on stdout, until stdin ends.
 *
 * A request is a head, the kernel's arguments, and their regions, each with where its pointer lies in the arguments, how
 * many bytes it has, where it lies within 64 bytes, and its content. The answer is the content of all regions.
 */
#include "../../align/kernels/native/kernels.c"

#include <stdio.h>

#define MAX_ARGUMENTS 256
#define MAX_REGIONS 16

typedef struct { int32_t kernel, isa, threads, regions; int64_t rows, argument_bytes; } head;
typedef struct { int64_t field, bytes, place; } region;
typedef void (*kernel)(const void *args, int64_t rows, int isa, int threads);

static const kernel KERNELS[] = {
    (kernel)align_row_statistics, (kernel)align_logit_gradient, (kernel)align_softmax, (kernel)align_sample};

static int take(void *to, int64_t bytes) { return bytes == 0 || fread(to, (size_t)bytes, 1, stdin) == 1; }

int main(void) {
    head h;
    while (take(&h, sizeof h)) {
        char arguments[MAX_ARGUMENTS], *memory[MAX_REGIONS], *held[MAX_REGIONS];
        region regions[MAX_REGIONS];
        if (h.argument_bytes > MAX_ARGUMENTS || h.regions > MAX_REGIONS || !take(arguments, h.argument_bytes)) return 1;
        for (int i = 0; i < h.regions; i++) {
            if (!take(&regions[i], sizeof(region))) return 1;
            held[i] = aligned_alloc(64, (size_t)(regions[i].bytes + 127) / 64 * 64);
            memory[i] = held[i] + regions[i].place;
            if (held[i] == NULL || !take(memory[i], regions[i].bytes)) return 1;
            memcpy(arguments + regions[i].field, &memory[i], sizeof(char *));
        }
        KERNELS[h.kernel](arguments, h.rows, h.isa, h.threads);
        for (int i = 0; i < h.regions; i++) {
            if (regions[i].bytes && fwrite(memory[i], (size_t)regions[i].bytes, 1, stdout) != 1) return 1;
            free(held[i]);
        }
        fflush(stdout);
    }
    return 0;
}
