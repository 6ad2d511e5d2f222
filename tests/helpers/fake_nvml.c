/* libnvidia-ml.so.1 for machines without a GPU: number 0 answers, number 1 was lost. As much of it as edge/gpu_metrics.py asks. */
#include <stddef.h>

enum { SUCCESS = 0, GPU_IS_LOST = 15 };
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned int gpu, memory; } utilization;
static int devices[2];

int nvmlInitWithFlags(unsigned int flags) { (void)flags; return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "success"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) { *handle = &devices[index]; return SUCCESS; }

int nvmlDeviceGetMemoryInfo(void *handle, memory *found) {
    if (handle != &devices[0]) return GPU_IS_LOST;
    *found = (memory){8ULL << 30, 6ULL << 30, 2ULL << 30};
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *handle, utilization *found) {
    if (handle != &devices[0]) return GPU_IS_LOST;
    *found = (utilization){25, 10};
    return SUCCESS;
}
