/* Stands for libnvidia-ml.so.1: two GPUs that take steady power, and answers that a test sets with `stand_in`. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { INIT, ENERGY, POWER, MIG_CODE, MIG, MILLIWATTS, LAST };
static long long state[LAST];
static const char *uuids[] = {"GPU-aaaaaaaa-0000-0000-0000-000000000000", "GPU-bbbbbbbb-0000-0000-0000-000000000000"};

void stand_in(int key, long long value) { state[key] = value; }

int nvmlInit_v2(void) { return (int)state[INIT]; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) {
    *gpu = (void *)(uintptr_t)(index + 1);
    return index < 2 ? 0 : 2;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
    for (unsigned i = 0; i < 2; i++)
        if (!strcmp(uuid, uuids[i])) return nvmlDeviceGetHandleByIndex_v2(i, gpu);
    return 6;
}

int nvmlDeviceGetUUID(void *gpu, char *text, unsigned size) {
    snprintf(text, size, "%s", uuids[(uintptr_t)gpu - 1]);
    return 0;
}

int nvmlDeviceGetMigMode(void *gpu, unsigned *now, unsigned *later) {
    *now = *later = (unsigned)state[MIG];
    return (int)state[MIG_CODE];
}

/* The second GPU takes twice as much. */
int nvmlDeviceGetTotalEnergyConsumption(void *gpu, unsigned long long *millijoules) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double seconds = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
    *millijoules = (unsigned long long)(seconds * (double)state[MILLIWATTS] * (double)(uintptr_t)gpu);
    return (int)state[ENERGY];
}

int nvmlDeviceGetPowerUsage(void *gpu, unsigned *milliwatts) {
    *milliwatts = (unsigned)state[MILLIWATTS] * (unsigned)(uintptr_t)gpu;
    return (int)state[POWER];
}

int nvmlDeviceGetName(void *gpu, char *text, unsigned size) {
    snprintf(text, size, "GPU number %d", (int)(uintptr_t)gpu - 1);
    return 0;
}

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, "570.1");
    return 0;
}

int nvmlDeviceGetEnforcedPowerLimit(void *gpu, unsigned *milliwatts) {
    *milliwatts = 350000;
    return gpu ? 0 : 2;
}

int nvmlDeviceGetTemperature(void *gpu, int sensor, unsigned *celsius) {
    *celsius = 41;
    return gpu && sensor == 0 ? 0 : 2;
}

int nvmlDeviceGetClockInfo(void *gpu, int which, unsigned *mhz) {
    *mhz = which == 1 ? 1980 : 3201;
    return gpu ? 0 : 2;
}
/* There is no nvmlDeviceGetEccMode: an old library lacks functions. */
