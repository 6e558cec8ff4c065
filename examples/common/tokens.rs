//! Text to tokens and back: by tokenizer.json where the model has one, else one token per byte.

use std::path::Path;

use tokenizers::Tokenizer;

use super::failure::{Failure, Result};

const FILE: &str = "tokenizer.json";

pub enum Tokens {
    Tokenizer(Box<Tokenizer>),
    Bytes,
}

impl Tokens {
    /// Of the model in `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE);
        if !path.is_file() {
            // Bytes would mean other tokens than the model's.
            if directory.join("tokenizer.model").is_file() {
                return Err(Failure::NotBuilt(format!("tokenizer.model without {FILE}")));
            }
            return Ok(Self::Bytes);
        }
        let tokenizer = Tokenizer::from_file(&path).map_err(|error| Failure::malformed(&path, error))?;
        Ok(Self::Tokenizer(Box::new(tokenizer)))
    }

    /// The tokens of `text`, which comes from `origin`; each must be below `vocab`, the model's number of tokens.
    /// `start`: with the special tokens that the tokenizer puts before a text.
    pub fn encode(&self, text: &[u8], origin: &str, vocab: usize, start: bool) -> Result<Vec<u32>> {
        let malformed = |problem: String| Failure::Malformed { file: origin.into(), problem };
        let ids: Vec<u32> = match self {
            Self::Bytes => text.iter().map(|&byte| byte.into()).collect(),
            Self::Tokenizer(tokenizer) => {
                let text = std::str::from_utf8(text).map_err(|error| malformed(error.to_string()))?;
                let encoding = tokenizer.encode_fast(text, start).map_err(|error| malformed(error.to_string()))?;
                encoding.get_ids().to_vec()
            }
        };
        match ids.iter().position(|&id| id as usize >= vocab) {
            None => Ok(ids),
            Some(at) => {
                let unit = if matches!(self, Self::Bytes) { "byte" } else { "token" };
                Err(malformed(format!("{unit} {at} is {}, but the model knows only tokens below {vocab}", ids[at])))
            }
        }
    }

    /// The text of `ids`. Bytes that are no text become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match self {
            Self::Tokenizer(tokenizer) => {
                let malformed = |error| Failure::malformed(Path::new(FILE), format!("cannot decode {ids:?}: {error}"));
                tokenizer.decode(ids, true).map_err(malformed)
            }
            Self::Bytes => {
                // 0xff is never text: a token beyond the bytes shows as U+FFFD, too.
                let bytes: Vec<u8> = ids.iter().map(|&id| u8::try_from(id).unwrap_or(0xff)).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Tokenizer(_) => FILE,
            Self::Bytes => "bytes",
        }
    }
}
