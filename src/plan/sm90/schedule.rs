//! When clusters that draw tickets are done: list scheduling, in time that does not grow with the number of tickets.

/// Workers by the time they are free, in clocks. Few times are distinct, because tickets of a kind last equally long.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Timeline {
    /// (time, workers), by ascending time, each time once.
    free: Vec<(f64, u64)>,
    workers: u64,
}

impl Timeline {
    /// So many workers (at least one), all free.
    pub(super) fn new(workers: u32) -> Timeline {
        let workers = u64::from(workers.max(1));
        Timeline { free: vec![(0.0, workers)], workers }
    }

    /// When the next ticket is drawn.
    pub(super) fn next(&self) -> f64 {
        self.free.first().map_or(0.0, |first| first.0)
    }

    /// When the last worker is done.
    pub(super) fn end(&self) -> f64 {
        self.free.last().map_or(0.0, |last| last.0)
    }

    /// Nobody draws before `time`.
    pub(super) fn wait(&mut self, time: f64) {
        let early = self.free.partition_point(|entry| entry.0 <= time);
        let count: u64 = self.free.drain(..early).map(|entry| entry.1).sum();
        if count > 0 {
            self.free.insert(0, (time, count));
        }
    }

    /// Hands out tickets that last `clocks` each, every one to the worker that is free first.
    pub(super) fn draw(&mut self, mut tickets: u64, clocks: f64) {
        if clocks <= 0.0 {
            return;
        }
        // One worker gets at most this many more than another, so the rounds before come to all alike.
        let lead = ((self.end() - self.next()) / clocks).ceil() as u64 + 1;
        let rounds = (tickets / self.workers).saturating_sub(lead);
        self.free.iter_mut().for_each(|(time, _)| *time += rounds as f64 * clocks);
        tickets -= rounds * self.workers;
        while tickets > 0 {
            tickets -= self.advance(tickets, clocks);
        }
    }

    /// Lets the workers that are free first draw until they have caught up with the next ones; tickets drawn.
    fn advance(&mut self, tickets: u64, clocks: f64) -> u64 {
        let (time, count) = self.free.remove(0);
        let ahead = self.free.first().map_or(1, |next| (((next.0 - time) / clocks).ceil() as u64).max(1));
        let each = ahead.min(tickets / count);
        if each == 0 {
            // Not enough for all of them.
            self.insert(time, count - tickets);
            self.insert(time + clocks, tickets);
            return tickets;
        }
        self.insert(time + each as f64 * clocks, count);
        each * count
    }

    fn insert(&mut self, time: f64, count: u64) {
        let at = self.free.partition_point(|entry| entry.0 < time);
        match self.free.get_mut(at) {
            Some(entry) if entry.0 == time => entry.1 += count,
            _ => self.free.insert(at, (time, count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Timeline;

    /// Ticket by ticket.
    fn naive(workers: u32, phases: &[(u64, f64)]) -> Vec<f64> {
        let mut free = vec![0.0_f64; workers as usize];
        for &(tickets, clocks) in phases {
            for _ in 0..tickets {
                let at = (0..free.len()).min_by(|&a, &b| free[a].total_cmp(&free[b])).unwrap();
                free[at] += clocks;
            }
        }
        free.sort_by(f64::total_cmp);
        free
    }

    #[test]
    fn the_same_as_ticket_by_ticket() {
        let mut seed = 1_u64;
        let mut random = |limit: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % limit
        };
        for _ in 0..500 {
            let workers = 1 + random(140) as u32;
            let phases: Vec<(u64, f64)> =
                (0..1 + random(4)).map(|_| (random(2000), (1 + random(5000)) as f64)).collect();
            let mut timeline = Timeline::new(workers);
            phases.iter().for_each(|&(tickets, clocks)| timeline.draw(tickets, clocks));
            let expected = naive(workers, &phases);
            let got: Vec<f64> = timeline.free.iter().flat_map(|&(time, count)| vec![time; count as usize]).collect();
            assert_eq!(got, expected, "{workers} workers, {phases:?}");
        }
    }

    #[test]
    fn nobody_draws_before_the_wait_is_over() {
        let mut timeline = Timeline::new(3);
        timeline.draw(1, 5.0);
        timeline.wait(2.0);
        assert_eq!(timeline, Timeline { free: vec![(2.0, 2), (5.0, 1)], workers: 3 });
        timeline.wait(7.0);
        timeline.wait(1.0);
        assert_eq!(timeline, Timeline { free: vec![(7.0, 3)], workers: 3 });
    }

    #[test]
    fn any_number_of_tickets_is_quick() {
        let mut timeline = Timeline::new(66);
        timeline.draw(3, 1e9);
        timeline.draw(u64::from(u32::MAX), 3.0);
        timeline.draw(u64::from(u32::MAX), 1e12);
        assert!(timeline.end().is_finite() && timeline.next() > 0.0);
    }
}
