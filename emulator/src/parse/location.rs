//! Line information: `.loc` and the names of inlined functions.

use super::Parser;
use super::lex::error;
use crate::report::ParseError;

/// A `.loc`, with the one that it is inlined at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Location {
    pub file: u32,
    pub line: u32,
    /// Label of the inlined function's name.
    pub function: Option<String>,
    /// An earlier location.
    pub inlined_at: Option<u32>,
}

impl Parser {
    pub(super) fn loc(&mut self) -> Result<(), ParseError> {
        let (file, line, column) = (self.small_number()?, self.small_number()?, self.number()?);
        let mut location = Location { file, line, ..Location::default() };
        while self.accept(",") {
            match self.next()?.as_str() {
                "function_name" => {
                    location.function = Some(self.next()?);
                    if self.accept("+") {
                        self.number()?;
                    }
                }
                "inlined_at" => {
                    // "… must match a previous .loc": that one says where it is inlined itself.
                    let (file, line) = (self.small_number()?, self.small_number()?);
                    let place = (file, line, self.number()?);
                    let outer = self.places.get(&place).copied().unwrap_or_else(|| {
                        self.source.locations.push(Location { file, line, ..Location::default() });
                        self.source.locations.len() as u32 - 1
                    });
                    location.inlined_at = Some(outer);
                }
                other => return error(self.line(), format!("`.loc … {other}` is not known")),
            }
        }
        self.location = self.source.locations.len() as u32;
        self.source.locations.push(location);
        self.places.insert((file, line, column), self.location);
        Ok(())
    }

    /// The block of `.debug_str`: labels with zero-terminated bytes.
    pub(super) fn strings(&mut self) -> Result<(), ParseError> {
        self.expect("{")?;
        let mut label = String::new();
        while !self.accept("}") {
            let word = self.next()?;
            if self.accept(":") {
                label = word;
                continue;
            }
            if word == ".b8" {
                let mut text = Vec::new();
                loop {
                    text.push(self.number()? as u8);
                    if !self.accept(",") {
                        break;
                    }
                }
                text.retain(|byte| *byte != 0);
                let text = String::from_utf8_lossy(&text);
                self.source.strings.entry(label.clone()).or_default().push_str(&text);
            }
        }
        Ok(())
    }
}
