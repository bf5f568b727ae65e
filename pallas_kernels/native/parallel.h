// Work on the threads that XLA has for one operation.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

// function(i) for each i in [0, n), in no order; it must not throw, or the process ends: for want of memory. The caller does all of it that no other thread comes to: so it never
// waits for a thread that waits for it.
template <typename Function>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t n, const Function& function) {
  struct Progress {
    std::atomic<int64_t> next{0}, num_inside{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [n, &function](Progress& progress) noexcept {
    for (int64_t i; (i = progress.next.fetch_add(1)) < n;) function(i);
  };
  const int64_t num_helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < num_helpers; i++) {
    pool.Schedule([progress, work] {  // whoever comes too late must not look at the function: it may be gone
      progress->num_inside.fetch_add(1);
      work(*progress);
      progress->num_inside.fetch_sub(1);
    });
  }
  work(*progress);
  while (progress->num_inside.load()) std::this_thread::yield();
}
