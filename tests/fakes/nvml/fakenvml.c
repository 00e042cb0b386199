/* A fake libnvidia-ml.so.1: it answers NVML calls from the text file that $FAKE_NVML names.
 *
 * A line of the file is "key = value"; '#' starts a comment at the beginning of a line or after a space.
 *   sys.count = 2                  how many cards there are
 *   sys.init = !18                 nvmlInit fails with NVML error 18
 *   gpu0.name = Tesla P40          a fact of card 0; gpu.name would be the default for all cards
 *   gpu1.temp = !15                asking card 1 for its temperature gives NVML error 15
 *   gpu1.handle = !15              card 1 cannot be opened at all
 *   gpu0.util = 0; 97; 98          what changes: each time it is asked for, the next, and then the last again
 *   gpu0.compute = 4711:1073741824 4712:-    processes and the bytes they hold ("-": the driver does not say)
 *   gpu0.nvlink.count = 4          NVLink ports, described by nvlink.KEY or, one by one, nvlinkN.KEY
 *   topo.0.1 = 30                  the common ancestor of a pair; p2p.0.1 and p2p.nvlink.0.1 likewise
 * A key that is absent answers 3, NVML_ERROR_NOT_SUPPORTED.
 *
 * stubs.h, made by build.py, defines every other function that nvidia-ml-py knows to answer 3 as well.
 * Without it, or compiled with -DOLD_DRIVER, functions are missing as they are in older drivers.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef void *Device; /* the card's index plus one */

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7, UNKNOWN = 999 };

/* ---- the file ---- */

static struct { char key[96], value[256]; int asked; } facts[8192];
static int fact_count, initialized;

static char *trimmed(char *text) {
    text += strspn(text, " \t");
    size_t length = strlen(text);
    while (length && strchr(" \t\r\n", text[length - 1])) text[--length] = 0;
    return text;
}

static void load(void) {
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[400];
    fact_count = 0;
    while (file && fact_count < 8192 && fgets(line, sizeof line, file)) {
        char *comment = strchr(line, '#');
        if (comment && (comment == line || comment[-1] == ' ')) *comment = 0;
        char *equals = strchr(line, '=');
        if (!equals) continue;
        *equals = 0;
        snprintf(facts[fact_count].key, sizeof facts->key, "%s", trimmed(line));
        snprintf(facts[fact_count].value, sizeof facts->value, "%s", trimmed(equals + 1));
        facts[fact_count].asked = 0;
        fact_count++;
    }
    if (file) fclose(file);
}

/* The part of "0; 97; 98" whose turn it is. */
static const char *in_turn(int i) {
    static char part[256];
    char *value = facts[i].value;
    if (!strchr(value, ';')) return value;
    for (int skipped = 0; skipped < facts[i].asked && strchr(value, ';'); skipped++) value = strchr(value, ';') + 1;
    facts[i].asked++;
    snprintf(part, sizeof part, "%.*s", (int)strcspn(value, ";"), value);
    return trimmed(part);
}

static const char *fact(const char *format, ...) {
    char key[96];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(key, sizeof key, format, arguments);
    va_end(arguments);
    for (int i = fact_count - 1; i >= 0; i--)
        if (!strcmp(facts[i].key, key)) return in_turn(i);
    return NULL;
}

static int index_of(Device device) { return (int)(long)device - 1; }

static const char *card_fact(Device device, const char *key) {
    const char *value = fact("gpu%d.%s", index_of(device), key);
    return value ? value : fact("gpu.%s", key);
}

/* What a value that is absent or "!N" answers; SUCCESS for one that holds a fact. */
static Result status(const char *value) {
    if (!value) return NOT_SUPPORTED;
    return value[0] == '!' ? atoi(value + 1) : SUCCESS;
}

static Result number(Device device, const char *key, u32 *out) {
    const char *value = card_fact(device, key);
    if (!status(value)) *out = (u32)strtoull(value, NULL, 0);
    return status(value);
}

static u64 bytes(Device device, const char *key) {
    const char *value = card_fact(device, key);
    return value ? strtoull(value, NULL, 0) : 0;
}

static Result copy(const char *value, char *out, u32 size) {
    if (!status(value)) snprintf(out, size, "%s", value);
    return status(value);
}

static int card_count(void) {
    const char *value = fact("sys.count");
    return value ? atoi(value) : 0;
}

/* ---- the library and the driver ---- */

Result nvmlInitWithFlags(u32 flags) {
    (void)flags;
    if (!initialized) load();
    const char *value = fact("sys.init");
    if (value && value[0] == '!') return atoi(value + 1);
    initialized++; /* as many calls as shut it down again */
    return SUCCESS;
}
Result nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

/* $FAKE_NVML_SHUTDOWN names a file that appears when the library is shut down, for tests to see. */
Result nvmlShutdown(void) {
    const char *path = getenv("FAKE_NVML_SHUTDOWN");
    if (!initialized) return UNINITIALIZED;
    if (--initialized) return SUCCESS;
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) fclose(file);
    return SUCCESS;
}

const char *nvmlErrorString(Result result) {
    switch (result) {
        case NOT_SUPPORTED: return "Not Supported";
        case 9: return "Driver Not Loaded";
        case 15: return "GPU is lost";
        case 18: return "RM has detected an NVML/RM version mismatch.";
        default: return "Unknown Error";
    }
}
Result nvmlSystemGetDriverVersion(char *out, u32 size) { return copy(fact("sys.driver"), out, size); }
Result nvmlSystemGetNVMLVersion(char *out, u32 size) { return copy(fact("sys.nvml"), out, size); }
Result nvmlSystemGetCudaDriverVersion(int *out) {
    const char *value = fact("sys.cuda");
    if (!status(value)) *out = atoi(value);
    return status(value);
}

/* ---- finding cards ---- */

Result nvmlDeviceGetCount_v2(u32 *out) {
    if (!initialized) return UNINITIALIZED;
    *out = card_count();
    return SUCCESS;
}
Result nvmlDeviceGetHandleByIndex_v2(u32 index, Device *out) {
    if (!initialized) return UNINITIALIZED;
    if ((int)index >= card_count()) return INVALID_ARGUMENT;
    *out = (Device)(long)(index + 1);
    const char *value = card_fact(*out, "handle");
    return value ? status(value) : SUCCESS;
}
Result nvmlDeviceGetHandleByUUID(const char *uuid, Device *out) {
    for (long i = 1; i <= card_count(); i++) {
        const char *value = card_fact((Device)i, "uuid");
        if (value && !strcmp(value, uuid)) return *out = (Device)i, SUCCESS;
    }
    return NOT_FOUND;
}
Result nvmlDeviceGetIndex(Device device, u32 *out) { return *out = index_of(device), SUCCESS; }
Result nvmlDeviceGetMinorNumber(Device device, u32 *out) { return *out = index_of(device), SUCCESS; }

#define TEXT(function, key) \
    Result function(Device device, char *out, u32 size) { return copy(card_fact(device, key), out, size); }
TEXT(nvmlDeviceGetName, "name")
TEXT(nvmlDeviceGetUUID, "uuid")
TEXT(nvmlDeviceGetVbiosVersion, "vbios")

typedef struct {
    char bus_id_legacy[16];
    u32 domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} PciInfo;

static Result pci_info(const char *address, PciInfo *out) {
    u32 domain, bus, device;
    if (status(address)) return status(address);
    if (sscanf(address, "%x:%x:%x", &domain, &bus, &device) != 3) return UNKNOWN;
    memset(out, 0, sizeof *out);
    out->domain = domain, out->bus = bus, out->device = device;
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", domain, bus, device);
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "%04X:%02X:%02X.0", domain, bus, device);
    return SUCCESS;
}
Result nvmlDeviceGetPciInfo_v3(Device device, PciInfo *out) {
    Result result = pci_info(card_fact(device, "bdf"), out);
    if (!result) out->device_id = (u32)bytes(device, "devid");
    return result;
}

/* ---- memory and processes ---- */

/* The first version of the call counts what the driver reserves as used. */
Result nvmlDeviceGetMemoryInfo(Device device, u64 out[3]) {
    const char *total = card_fact(device, "mem.total");
    if (status(total)) return status(total);
    out[0] = strtoull(total, NULL, 0);
    out[2] = bytes(device, "mem.used") + bytes(device, "mem.reserved");
    out[1] = out[0] - out[2];
    return SUCCESS;
}
Result nvmlDeviceGetBAR1MemoryInfo(Device device, u64 out[3]) {
    const char *total = card_fact(device, "bar1.total");
    if (status(total)) return status(total);
    out[0] = strtoull(total, NULL, 0);
    out[2] = bytes(device, "bar1.used");
    out[1] = out[0] - out[2];
    return SUCCESS;
}

typedef struct { u32 pid; u64 used_bytes; u32 gpu_instance, compute_instance; } Process;

static Result processes(Device device, const char *key, u32 *count, Process *out) {
    const char *value = card_fact(device, key);
    u32 room = *count, found = 0;
    if (value && status(value)) return status(value);
    for (; value && *value; found++) {
        char *rest;
        u32 pid = strtoul(value, &rest, 10);
        u64 held = rest[1] == '-' ? ~0ULL : strtoull(rest + 1, NULL, 0);
        if (out && found < room) out[found] = (Process){pid, held, ~0U, ~0U};
        value = rest + strcspn(rest, " ");
        value += strspn(value, " ");
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}
Result nvmlDeviceGetComputeRunningProcesses_v2(Device device, u32 *count, Process *out) {
    return processes(device, "compute", count, out);
}
Result nvmlDeviceGetGraphicsRunningProcesses_v2(Device device, u32 *count, Process *out) {
    return processes(device, "graphics", count, out);
}

#ifndef OLD_DRIVER
Result nvmlSystemGetCudaDriverVersion_v2(int *out) { return nvmlSystemGetCudaDriverVersion(out); }
typedef struct { u32 version; u64 total, reserved, free, used; } MemoryInfo;
Result nvmlDeviceGetMemoryInfo_v2(Device device, MemoryInfo *out) {
    const char *total = card_fact(device, "mem.total");
    if (status(total)) return status(total);
    out->total = strtoull(total, NULL, 0);
    out->reserved = bytes(device, "mem.reserved");
    out->used = bytes(device, "mem.used");
    out->free = out->total - out->used - out->reserved;
    return SUCCESS;
}
Result nvmlDeviceGetComputeRunningProcesses_v3(Device device, u32 *count, Process *out) {
    return processes(device, "compute", count, out);
}
Result nvmlDeviceGetGraphicsRunningProcesses_v3(Device device, u32 *count, Process *out) {
    return processes(device, "graphics", count, out);
}
#endif

/* ---- one number, or one number and another ---- */

#define NUMBER(function, key) \
    Result function(Device device, u32 *out) { return number(device, key, out); }
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, "pcie.gen")
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, "pcie.genmax")
NUMBER(nvmlDeviceGetGpuMaxPcieLinkGeneration, "pcie.gendev")
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, "pcie.width")
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, "pcie.widthmax")
NUMBER(nvmlDeviceGetPcieReplayCounter, "pcie.replay")
NUMBER(nvmlDeviceGetPersistenceMode, "persistence")
NUMBER(nvmlDeviceGetComputeMode, "computemode")
NUMBER(nvmlDeviceGetPowerUsage, "power.draw")
NUMBER(nvmlDeviceGetPowerManagementLimit, "power.limit")
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, "power.default")
NUMBER(nvmlDeviceGetEnforcedPowerLimit, "power.limit")
NUMBER(nvmlDeviceGetPerformanceState, "pstate")
NUMBER(nvmlDeviceGetArchitecture, "arch")
NUMBER(nvmlDeviceGetBrand, "brand")
NUMBER(nvmlDeviceGetDisplayActive, "display")
NUMBER(nvmlDeviceGetDisplayMode, "display")
NUMBER(nvmlDeviceGetVirtualizationMode, "virt")
NUMBER(nvmlDeviceGetNumaNodeId, "numa")
NUMBER(nvmlDeviceGetFanSpeed, "fan")
NUMBER(nvmlDeviceGetMemoryBusWidth, "membus")
NUMBER(nvmlDeviceGetRetiredPagesPendingStatus, "retired.pending")

#define TWICE(function, key) /* current, and pending, which is equal where the file does not say */ \
    Result function(Device device, u32 *current, u32 *pending) { \
        Result result = number(device, key, current); \
        if (!result && number(device, key ".pending", pending)) *pending = *current; \
        return result; \
    }
TWICE(nvmlDeviceGetEccMode, "ecc")
TWICE(nvmlDeviceGetMigMode, "mig")

Result nvmlDeviceGetPowerManagementLimitConstraints(Device device, u32 *lowest, u32 *highest) {
    Result result = number(device, "power.min", lowest);
    return result ? result : number(device, "power.max", highest);
}
Result nvmlDeviceGetCudaComputeCapability(Device device, int *major, int *minor) {
    const char *value = card_fact(device, "cc");
    if (status(value)) return status(value);
    return sscanf(value, "%d.%d", major, minor) == 2 ? SUCCESS : UNKNOWN;
}
Result nvmlDeviceGetUtilizationRates(Device device, u32 out[2]) {
    out[1] = 0;
    return number(device, "util", out);
}
Result nvmlDeviceGetTemperature(Device device, u32 sensor, u32 *out) {
    return sensor == 0 ? number(device, "temp", out) : INVALID_ARGUMENT;
}
Result nvmlDeviceGetTemperatureThreshold(Device device, u32 threshold, u32 *out) {
    static const char *keys[] = {"temp.shutdown", "temp.slowdown", "temp.memmax", "temp.gpumax"};
    return threshold < 4 ? number(device, keys[threshold], out) : NOT_SUPPORTED;
}
Result nvmlDeviceGetMaxClockInfo(Device device, u32 clock, u32 *out) {
    static const char *keys[] = {"clock.graphics", "clock.sm", "clock.mem", "clock.video"};
    return clock < 4 ? number(device, keys[clock], out) : INVALID_ARGUMENT;
}
Result nvmlDeviceGetClockInfo(Device device, u32 clock, u32 *out) {
    static const char *keys[] = {"clock.now.graphics", "clock.now.sm", "clock.now.mem", "clock.now.video"};
    return clock < 4 ? number(device, keys[clock], out) : INVALID_ARGUMENT;
}
Result nvmlDeviceGetMarginTemperature(Device device, u32 out[2]) { return number(device, "temp.margin", &out[1]); }
Result nvmlDeviceGetTotalEccErrors(Device device, u32 type, u32 counter, u64 *out) {
    static const char *keys[] = {"ecc.volatile", "ecc.aggregate"};
    const char *value = type == 1 && counter < 2 ? card_fact(device, keys[counter]) : NULL;
    if (!status(value)) *out = strtoull(value, NULL, 0);
    return status(value);
}
typedef struct { u32 version; unsigned char cluster[16]; Result status; u32 clique; unsigned char state; u32 health; } Fabric;
Result nvmlDeviceGetGpuFabricInfoV(Device device, Fabric *out) {
    u32 state = 0, result = 0;
    Result missing = number(device, "fabric.state", &state);
    if (missing) return missing;
    number(device, "fabric.status", &result);
    out->state = (unsigned char)state, out->status = (Result)result;
    return SUCCESS;
}
Result nvmlDeviceGetRemappedRows(Device device, u32 *corrected, u32 *uncorrected, u32 *pending, u32 *failure) {
    *uncorrected = *pending = *failure = 0;
    Result result = number(device, "remap.corr", corrected);
    number(device, "remap.unc", uncorrected);
    number(device, "remap.pending", pending);
    number(device, "remap.failure", failure);
    return result;
}
static Result clock_events(Device device, u64 *out) {
    const char *value = card_fact(device, "events");
    if (!status(value)) *out = strtoull(value, NULL, 0);
    return status(value);
}
Result nvmlDeviceGetCurrentClocksThrottleReasons(Device device, u64 *out) { return clock_events(device, out); }
#ifndef OLD_DRIVER
Result nvmlDeviceGetCurrentClocksEventReasons(Device device, u64 *out) { return clock_events(device, out); }
#endif
Result nvmlDeviceGetCpuAffinity(Device device, u32 words, unsigned long *out) {
    const char *value = card_fact(device, "cpumask");
    if (status(value)) return status(value);
    memset(out, 0, words * sizeof *out);
    out[0] = strtoull(value, NULL, 16);
    return SUCCESS;
}

typedef struct {
    u32 field, scope;
    long long timestamp, latency;
    u32 type;
    Result result;
    union { double as_double; u64 as_u64; } value;
} FieldValue;
Result nvmlDeviceGetFieldValues(Device device, int count, FieldValue *fields) {
    for (int i = 0; i < count; i++) {
        char own[48], common[32]; /* fi.163.7 is what port 7 counts, fi.163 what each other one does */
        snprintf(own, sizeof own, "fi.%u.%u", fields[i].field, fields[i].scope);
        snprintf(common, sizeof common, "fi.%u", fields[i].field);
        const char *value = card_fact(device, own);
        if (!value) value = card_fact(device, common);
        fields[i].timestamp = fields[i].latency = 0;
        fields[i].result = status(value);
        if (fields[i].result) continue;
        fields[i].type = 3; /* unsigned long long */
        fields[i].value.as_u64 = strtoull(value, NULL, 0);
    }
    return SUCCESS;
}

/* ---- pairs of cards, and NVLink ---- */

static Result pair(Device one, Device other, const char *key, int *out) {
    int a = index_of(one), b = index_of(other);
    const char *value = fact("%s.%d.%d", key, a, b);
    if (!value) value = fact("%s.%d.%d", key, b, a);
    if (!value) value = fact("%s", key);
    if (!status(value)) *out = atoi(value);
    return status(value);
}
Result nvmlDeviceGetTopologyCommonAncestor(Device one, Device other, int *out) {
    return pair(one, other, "topo", out);
}
Result nvmlDeviceGetP2PStatus(Device one, Device other, int capability, int *out) {
    static const char *keys[] = {"p2p.read", "p2p.write", "p2p.nvlink", "p2p.atomics", "p2p.pci"};
    if (capability < 0 || capability > 4) return INVALID_ARGUMENT;
    Result result = pair(one, other, keys[capability], out);
    return result == NOT_SUPPORTED ? pair(one, other, "p2p", out) : result;
}

static const char *port_fact(Device device, u32 port, const char *key) {
    char own[64], common[64];
    u32 count = 0;
    snprintf(own, sizeof own, "nvlink%u.%s", port, key);
    snprintf(common, sizeof common, "nvlink.%s", key);
    const char *value = card_fact(device, own);
    if (value || number(device, "nvlink.count", &count) || port >= count) return value;
    return card_fact(device, common);
}
static Result port_number(Device device, u32 port, const char *key, u32 *out) {
    const char *value = port_fact(device, port, key);
    if (!status(value)) *out = (u32)strtoul(value, NULL, 0);
    return status(value);
}
Result nvmlDeviceGetNvLinkState(Device device, u32 port, u32 *out) {
    return port_number(device, port, "state", out);
}
Result nvmlDeviceGetNvLinkVersion(Device device, u32 port, u32 *out) {
    return port_number(device, port, "version", out);
}
#ifndef OLD_DRIVER
Result nvmlDeviceGetNvLinkRemoteDeviceType(Device device, u32 port, u32 *out) {
    return port_number(device, port, "remotetype", out);
}
#endif
Result nvmlDeviceGetNvLinkRemotePciInfo_v2(Device device, u32 port, PciInfo *out) {
    return pci_info(port_fact(device, port, "remote"), out);
}
Result nvmlDeviceGetNvLinkErrorCounter(Device device, u32 port, u32 counter, u64 *out) {
    u32 value = 0;
    (void)counter;
    Result result = port_number(device, port, "errors", &value);
    *out = value;
    return result;
}

#ifdef STUBS
#include "stubs.h"
#endif
