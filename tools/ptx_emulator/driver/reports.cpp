// Options, reports and errors.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <set>
#include <tuple>

#include "driver.h"

std::recursive_mutex the_lock;
static CUresult kernel_error = CUDA_SUCCESS;

const char *text_option(const char *name) {
  const char *text = getenv((std::string("PTX_EMULATOR_") + name).c_str());
  return text ? text : "";
}

long option(const char *name, long otherwise) {
  const char *text = text_option(name);
  return *text ? atol(text) : otherwise;
}

void report(const char *format, ...) {
  va_list list;
  char text[4096];
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  FILE *file = *text_option("REPORTS") ? fopen(text_option("REPORTS"), "a") : nullptr;
  fprintf(file ? file : stderr, "emulator: %s\n", text);
  if (file) fclose(file);
}

void stop(CUresult error) {
  kernel_error = error;
  running.stopped = true;
}

CUresult take_error() {
  CUresult was = kernel_error;
  kernel_error = CUDA_SUCCESS;
  return was;
}

std::string source_line(int line) {
  FILE *file = fopen(running.kernel->library->source.c_str(), "r");
  if (!file) return "";
  char *text = nullptr;
  size_t size = 0;
  for (int i = 0; i < line && getline(&text, &size, file) > 0; i++) {}
  fclose(file);
  std::string all = text ? text : "";
  free(text);
  size_t first = all.find_first_not_of(" \t"), last = all.find_last_not_of(" \t\n");
  return first == std::string::npos ? "" : all.substr(first, std::min<size_t>(last + 1 - first, 200));
}

std::string place(int line) {
  return running.kernel->library->source + ":" + std::to_string(line) + ": " + source_line(line);
}

void fault(Thread *t, int line, const char *kind, u64 address, u32 size) {
  report("%s\n  of %u bytes at %#lx by thread (%u, %u, %u) of block (%u, %u, %u), %s\n  %s\n  kernel %.90s", kind, size, address,
         t->tid[0], t->tid[1], t->tid[2], t->ctaid[0], t->ctaid[1], t->ctaid[2], nearest_allocation(address).c_str(),
         place(line).c_str(), running.kernel->info->name);
  stop(strstr(kind, "misaligned") ? CUDA_ERROR_MISALIGNED_ADDRESS
       : !strcmp(kind, "trap")    ? CUDA_ERROR_LAUNCH_FAILED
                                  : CUDA_ERROR_ILLEGAL_ADDRESS);
  yield();  // forever
  abort();
}

bool told_before(const void *kernel, int line, int other) {
  static std::set<std::tuple<const void *, int, int>> told;
  return !told.insert({kernel, std::min(line, other), std::max(line, other)}).second;
}
