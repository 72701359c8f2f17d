# Argument: how many files below /usr to read 4 KiB of, each at a random place, without the kernel's
# read-ahead. Writes the milliseconds of each read to /out/result.json.
import json, os, random, stat, sys, time

PAGE = 4096
files = []
for base, _, names in os.walk("/usr"):
    for name in names:
        path = os.path.join(base, name)
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size >= PAGE:
            files.append((path, status.st_size))
files.sort()
random.seed(1)
chosen = random.sample(files, min(int(sys.argv[1]), len(files)))
time.sleep(0.5)
print("BEGIN", len(chosen), flush=True)
milliseconds = []
for path, size in chosen:
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    place = random.randrange(size // PAGE) * PAGE
    began = time.perf_counter()
    got = os.pread(file, PAGE, place)
    milliseconds.append((time.perf_counter() - began) * 1e3)
    os.close(file)
    if len(got) != PAGE:
        sys.exit(f"{path}: {len(got)} bytes at {place}")
with open("/out/result.json", "w") as out:
    json.dump({"milliseconds": milliseconds}, out)
