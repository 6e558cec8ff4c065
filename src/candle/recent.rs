//! A small map that forgets what was used longest ago.

/// At most `limit` values, the one used last at the end.
pub(super) struct Recent<K, V> {
    entries: Vec<(K, V)>,
    limit: usize,
}

impl<K: PartialEq + Clone, V: Clone> Recent<K, V> {
    pub(super) const fn new(limit: usize) -> Self {
        Self { entries: Vec::new(), limit }
    }

    /// The value of `key`, made where there is none.
    pub(super) fn get_or_try<E>(&mut self, key: &K, make: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        let entry = match self.entries.iter().position(|(other, _)| other == key) {
            Some(at) => self.entries.remove(at),
            None => (key.clone(), make()?),
        };
        let value = entry.1.clone();
        self.entries.push(entry);
        if self.entries.len() > self.limit {
            self.entries.remove(0);
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_was_used_last() {
        let mut recent = Recent::new(2);
        let mut made = Vec::new();
        for key in ["a", "b", "a", "c", "a", "b"] {
            let make = || {
                made.push(key);
                Ok::<_, ()>(key.len())
            };
            assert_eq!(recent.get_or_try(&key, make), Ok(1));
        }
        assert_eq!(made, ["a", "b", "c", "b"]); // b went when c came
        assert_eq!(recent.get_or_try(&"d", || Err("no memory")), Err("no memory"));
        assert_eq!(recent.get_or_try(&"b", || Err("made again")), Ok(1)); // a failure drops nothing
    }
}
