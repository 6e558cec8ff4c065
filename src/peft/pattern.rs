//! Regular expressions in Python's syntax, and the bounds on compiling and matching them.
//!
//! Most patterns of real adapters are plain names, and there may be one for every module: those are compared as text
//! and found by their length. The others are compiled as Python reads them: without look-around and backreferences they
//! match in time linear in the name, with them by backtracking. [`Fuel`] bounds both over all names.

use std::cell::OnceCell;
use std::collections::HashMap;

use super::error::shorten;
use super::{ErrorKind, Result};

/// Expressions that are not plain names, per configuration.
const MAX_EXPRESSIONS: usize = 64;
/// Bytes of one expression.
const MAX_LENGTH: usize = 16 << 10;
/// Product of all counted repetitions of one expression, which multiply its size and its time.
const MAX_REPETITION: u64 = 256;
/// Bytes of a compiled expression.
const MAX_COMPILED: usize = 1 << 20;
/// Backtracking steps for one name: some for every name, many for a few of them.
const BACKTRACK: [usize; 2] = [500, 50_000];
/// Bytes of a module's name.
const MAX_NAME: usize = 1 << 10;

/// Work left for matching, in bytes of name times bytes of expression.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fuel(u64);

impl Default for Fuel {
    /// Twenty thousand names against several expressions of hundreds of bytes.
    fn default() -> Self {
        Self(1 << 30)
    }
}

/// An expression that is not a plain name.
#[derive(Debug)]
pub(super) struct Regex {
    key: &'static str,
    shown: String,
    expression: String,
    /// Compiled with the lower of the limits [`BACKTRACK`].
    compiled: fancy_regex::Regex,
    /// With the higher, for the few names that need it.
    patient: OnceCell<fancy_regex::Regex>,
    /// Fuel per byte of a name.
    weight: u64,
}

impl Regex {
    /// `pattern` is what stands in the configuration at `key`, `expression` the same in its frame.
    pub(super) fn new(key: &'static str, pattern: &str, expression: &str, count: &mut usize) -> Result<Self> {
        let refuse = |message: String| ErrorKind::Pattern { key, pattern: shorten(pattern), message };
        *count += 1;
        if *count > MAX_EXPRESSIONS {
            return Err(
                refuse(format!("it is the {count}th expression, at most {MAX_EXPRESSIONS} are accepted")).into()
            );
        }
        if pattern.len() > MAX_LENGTH {
            return Err(refuse(format!("it has {} bytes, at most {MAX_LENGTH} are accepted", pattern.len())).into());
        }
        let repetition = repetition(pattern);
        if repetition > MAX_REPETITION {
            let message =
                format!("its counted repetitions multiply to {repetition}, at most {MAX_REPETITION} are accepted");
            return Err(refuse(message).into());
        }
        let compiled = compile(expression, BACKTRACK[0]).map_err(|error| refuse(error.to_string()))?;
        let weight = expression.len() as u64 * repetition;
        Ok(Self {
            key,
            shown: shorten(pattern),
            expression: expression.to_owned(),
            compiled,
            patient: OnceCell::new(),
            weight,
        })
    }

    pub(super) fn matches(&self, name: &str, fuel: &mut Fuel) -> Result<bool> {
        self.run(name, fuel, |regex| regex.is_match(name))
    }

    /// The number that the group `idx` matched.
    pub(super) fn index(&self, name: &str, fuel: &mut Fuel) -> Result<Option<u64>> {
        self.run(name, fuel, |regex| {
            let captures = regex.captures(name)?;
            Ok(captures
                .and_then(|captures| captures.name("idx").map(|index| index.as_str().parse().unwrap_or(u64::MAX))))
        })
    }

    fn run<T>(
        &self,
        name: &str,
        fuel: &mut Fuel,
        run: impl Fn(&fancy_regex::Regex) -> Result<T, fancy_regex::Error>,
    ) -> Result<T> {
        if name.len() > MAX_NAME {
            return Err(self.cost(name, format!("the name has {} bytes, at most {MAX_NAME} are accepted", name.len())));
        }
        let length = name.len() as u64 + 1;
        self.spend(name, fuel, self.weight * length)?;
        if let Ok(found) = run(&self.compiled) {
            return Ok(found);
        }
        // Once more with the higher limit, whose steps are paid for beforehand.
        self.spend(name, fuel, BACKTRACK[1] as u64 * length)?;
        if self.patient.get().is_none() {
            let patient =
                compile(&self.expression, BACKTRACK[1]).map_err(|error| self.cost(name, error.to_string()))?;
            let _ = self.patient.set(patient);
        }
        run(self.patient.get().unwrap_or(&self.compiled)).map_err(|error| self.cost(name, error.to_string()))
    }

    fn spend(&self, name: &str, fuel: &mut Fuel, steps: u64) -> Result<()> {
        fuel.0 = fuel
            .0
            .checked_sub(steps)
            .ok_or_else(|| self.cost(name, "the work allowed for all names is spent".into()))?;
        Ok(())
    }

    fn cost(&self, name: &str, message: String) -> super::Error {
        ErrorKind::PatternCost { key: self.key, pattern: self.shown.clone(), name: shorten(name), message }.into()
    }
}

fn compile(expression: &str, backtrack: usize) -> Result<fancy_regex::Regex, fancy_regex::Error> {
    fancy_regex::RegexBuilder::new(expression).backtrack_limit(backtrack).delegate_size_limit(MAX_COMPILED).build()
}

/// The product of all numbers in braces: `{3,40}` counts 40, `{3,}` 3.
fn repetition(pattern: &str) -> u64 {
    let braces = pattern.split('{').skip(1).filter_map(|rest| rest.split_once('}'));
    braces.fold(1, |product: u64, (inside, _)| {
        let counts = inside.split(',').filter_map(|count| match count.trim() {
            "" => None,
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => Some(digits.parse().unwrap_or(u64::MAX)),
            _ => None,
        });
        product.saturating_mul(counts.max().unwrap_or(1).max(1))
    })
}

/// A list of expressions of which the first that matches counts.
#[derive(Debug)]
pub(super) struct Patterns {
    /// Plain names: characters, `None` for one of any kind.
    plain: Vec<Plain>,
    /// Indices into `plain` by number of characters, ascending.
    by_length: HashMap<usize, Vec<usize>>,
    /// The others, with their place in the list.
    expressions: Vec<(usize, Regex)>,
    /// A match may end before a dot, too: it names the module or one that contains it.
    ancestors: bool,
}

#[derive(Debug)]
struct Plain {
    /// Place in the list.
    place: usize,
    /// Opens with `^`: matches from the start of the name only.
    anchored: bool,
    characters: Vec<Option<char>>,
}

impl Patterns {
    /// `(.*\.)?(PATTERN)$` from the start of the name: as PEFT reads `rank_pattern` and `alpha_pattern`.
    pub(super) fn names<'a>(
        key: &'static str,
        patterns: impl Iterator<Item = &'a str>,
        count: &mut usize,
    ) -> Result<Self> {
        Self::new(key, patterns, count, false, |pattern| format!(r"\A(?:(.*\.)?({pattern})$)"))
    }

    /// `(^|.*\.)PATTERN($|\..*)` from the start of the name: as PEFT reads `modules_to_save`.
    pub(super) fn ancestors<'a>(
        key: &'static str,
        patterns: impl Iterator<Item = &'a str>,
        count: &mut usize,
    ) -> Result<Self> {
        Self::new(key, patterns, count, true, |pattern| format!(r"\A(?:(^|.*\.){pattern}($|\..*))"))
    }

    fn new<'a>(
        key: &'static str,
        patterns: impl Iterator<Item = &'a str>,
        count: &mut usize,
        ancestors: bool,
        frame: impl Fn(&str) -> String,
    ) -> Result<Self> {
        let mut all = Self { plain: Vec::new(), by_length: HashMap::new(), expressions: Vec::new(), ancestors };
        for (place, pattern) in patterns.enumerate() {
            match Plain::new(place, pattern) {
                Some(plain) => {
                    all.by_length.entry(plain.characters.len()).or_default().push(all.plain.len());
                    all.plain.push(plain);
                }
                None => all.expressions.push((place, Regex::new(key, pattern, &frame(pattern), count)?)),
            }
        }
        Ok(all)
    }

    /// Place of the first pattern that matches.
    pub(super) fn first(&self, name: &str, fuel: &mut Fuel) -> Result<Option<usize>> {
        let plain = self.first_plain(name);
        for (place, regex) in &self.expressions {
            if plain.is_none_or(|plain| *place < plain) && regex.matches(name, fuel)? {
                return Ok(Some(*place));
            }
        }
        Ok(plain)
    }

    fn first_plain(&self, name: &str) -> Option<usize> {
        if self.plain.is_empty() {
            return None;
        }
        let characters: Vec<char> = name.chars().collect();
        let dots = characters.iter().enumerate().filter(|(_, character)| **character == '.').map(|(at, _)| at);
        let starts: Vec<usize> = [0].into_iter().chain(dots.clone().map(|dot| dot + 1)).collect();
        let mut ends = vec![characters.len()];
        if self.ancestors {
            ends.extend(dots);
        }
        let spans = starts.iter().flat_map(|start| ends.iter().map(move |end| (*start, *end)));
        spans
            .filter_map(|(start, end)| {
                let span = characters.get(start..end)?;
                let candidates = self.by_length.get(&span.len())?.iter().filter_map(|&index| self.plain.get(index));
                candidates
                    .into_iter()
                    .find(|plain| (start == 0 || !plain.anchored) && plain.matches(span))
                    .map(|plain| plain.place)
            })
            .min()
    }
}

impl Plain {
    /// `None` where the pattern is more than a name, with `.` for any character, `\.` for a dot, and `^` at the start.
    fn new(place: usize, pattern: &str) -> Option<Self> {
        let anchored = pattern.starts_with('^');
        let mut rest = pattern.chars().skip(usize::from(anchored));
        let mut characters = Vec::new();
        while let Some(character) = rest.next() {
            characters.push(match character {
                '.' => None,
                '\\' if rest.next() == Some('.') => Some('.'),
                '_' | '-' => Some(character),
                _ if character.is_alphanumeric() => Some(character),
                _ => return None,
            });
        }
        Some(Self { place, anchored, characters })
    }

    fn matches(&self, span: &[char]) -> bool {
        // From the end, where names differ.
        self.characters.len() == span.len()
            && self.characters.iter().zip(span).rev().all(|(expected, got)| match expected {
                None => *got != '\n',
                Some(character) => character == got,
            })
    }
}
