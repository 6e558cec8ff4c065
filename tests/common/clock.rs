//! How long something takes, whatever else the machine does.

use std::fs;
use std::time::{Duration, Instant};

/// Time that this thread computed, where Linux tells it: others on the machine do not count. Elsewhere time as it passes.
pub struct Clock {
    computed: Option<Duration>,
    start: Instant,
}

impl Clock {
    pub fn start() -> Self {
        Self { computed: Self::computed(), start: Instant::now() }
    }

    fn computed() -> Option<Duration> {
        let line = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        line.split(' ').next()?.parse().ok().filter(|&nanoseconds| nanoseconds > 0).map(Duration::from_nanos)
    }

    pub fn elapsed(&self) -> Duration {
        match (self.computed, Self::computed()) {
            (Some(before), Some(now)) => now.saturating_sub(before),
            _ => self.start.elapsed(),
        }
    }
}
