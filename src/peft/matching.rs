//! Which modules carry factors, and with which rank and scale: PEFT's rule, with a bound on the work.

use std::cell::Cell;
use std::collections::HashSet;

use super::pattern::{Fuel, Patterns, Regex};
use super::{Config, ErrorKind, Module, Names, Result, Targets};

/// A [`Config`] compiled for matching many names. What it spends on regular expressions is bounded over all of them.
#[derive(Debug)]
pub struct Matcher<'a> {
    config: &'a Config,
    targets: Selector<'a>,
    exclude: Selector<'a>,
    save: Patterns,
    layers: Vec<Regex>,
    ranks: Patterns,
    alphas: Patterns,
    fuel: Cell<Fuel>,
}

/// Names, compiled.
#[derive(Debug)]
enum Selector<'a> {
    /// Everything.
    All,
    List(HashSet<&'a str>),
    Regex(Box<Regex>),
}

impl<'a> Matcher<'a> {
    pub(super) fn new(config: &'a Config) -> Result<Self> {
        config.check()?;
        let mut count = 0;
        let mut selector = |key, names: &'a Names| match names {
            Names::List(list) => Ok(Selector::List(list.iter().map(String::as_str).collect())),
            Names::Regex(pattern) => Regex::new(key, pattern, &format!(r"\A(?:{pattern})\z"), &mut count)
                .map(|regex| Selector::Regex(Box::new(regex))),
        };
        let targets = match &config.target_modules {
            Targets::Names(names) => selector("target_modules", names)?,
            Targets::AllLinear => Selector::All,
        };
        let exclude = match &config.exclude_modules {
            Some(names) => selector("exclude_modules", names)?,
            None => Selector::List(HashSet::new()),
        };
        let layer = |pattern: &String| {
            Regex::new("layers_pattern", pattern, &format!(r"\A(?:(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.)"), &mut count)
        };
        let mut layers = config.layers_pattern.iter().map(layer).collect::<Result<Vec<_>>>()?;
        if layers.is_empty() && config.layers_to_transform.is_some() {
            let any = r"\A(?:.*?\.[^.]*\.(?P<idx>\d+)\.)";
            layers.push(Regex::new("layers_pattern", any, any, &mut count)?);
        }
        let save = config.modules_to_save.iter().map(String::as_str);
        let ranks = config.rank_pattern.iter().map(|(pattern, _)| pattern.as_str());
        let alphas = config.alpha_pattern.iter().map(|(pattern, _)| pattern.as_str());
        Ok(Self {
            config,
            targets,
            exclude,
            save: Patterns::ancestors("modules_to_save", save, &mut count)?,
            layers,
            ranks: Patterns::names("rank_pattern", ranks, &mut count)?,
            alphas: Patterns::names("alpha_pattern", alphas, &mut count)?,
            fuel: Cell::default(),
        })
    }

    /// Rank, α and scale of the module of this name, or `None` where it carries no factors.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AllLinear`] before [`Config::expand_all_linear`]; [`ErrorKind::PatternCost`] where a regular
    /// expression takes too long on this name, or all of them did on the names so far.
    pub fn targets(&self, name: &str) -> Result<Option<Module>> {
        if self.config.target_modules == Targets::AllLinear {
            return Err(ErrorKind::AllLinear { name: name.to_owned() }.into());
        }
        self.linear(name)
    }

    /// The same for a name that is known to be a linear module, and not the output head.
    pub(super) fn linear(&self, name: &str) -> Result<Option<Module>> {
        let mut fuel = self.fuel.take();
        let found = self.find(name, &mut fuel);
        self.fuel.set(fuel);
        found
    }

    fn find(&self, name: &str, fuel: &mut Fuel) -> Result<Option<Module>> {
        if self.exclude.matches(name, fuel)? || self.save.first(name, fuel)?.is_some() {
            return Ok(None);
        }
        // A name that is listed whole is targeted in whatever layer it is.
        let listed = matches!(&self.targets, Selector::List(list) if list.contains(name));
        let targeted = listed || (self.targets.matches(name, fuel)? && self.in_layers(name, fuel)?);
        if !targeted {
            return Ok(None);
        }
        let rank = self.ranks.first(name, fuel)?.and_then(|index| self.config.rank_pattern.get(index));
        let alpha = self.alphas.first(name, fuel)?.and_then(|index| self.config.alpha_pattern.get(index));
        let (r, alpha) =
            (rank.map_or(self.config.r, |(_, r)| *r), alpha.map_or(self.config.lora_alpha, |(_, alpha)| *alpha));
        let divisor = if self.config.use_rslora { (r as f64).sqrt() } else { r as f64 };
        Ok(Some(Module { r, alpha, scale: alpha / divisor }))
    }

    fn in_layers(&self, name: &str, fuel: &mut Fuel) -> Result<bool> {
        let Some(wanted) = self.config.layers_to_transform.as_ref().filter(|list| !list.is_empty()) else {
            return Ok(true);
        };
        for layer in &self.layers {
            if let Some(index) = layer.index(name, fuel)? {
                return Ok(wanted.contains(&index));
            }
        }
        Ok(false)
    }
}

impl Selector<'_> {
    fn matches(&self, name: &str, fuel: &mut Fuel) -> Result<bool> {
        Ok(match self {
            Self::All => true,
            Self::List(list) => {
                list.contains(name) || name.match_indices('.').any(|(dot, _)| list.contains(&name[dot + 1..]))
            }
            Self::Regex(regex) => regex.matches(name, fuel)?,
        })
    }
}
