//! Text to tokens.

use crate::report::ParseError;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub text: String,
    pub line: u32,
}

pub(super) fn error<T>(line: u32, message: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError { line, message: message.into() })
}

/// Splits into words and single punctuation characters; comments vanish. A word keeps its dots, `%`, `$` and `::`.
pub(super) fn tokens(text: &str) -> Result<Vec<Token>, ParseError> {
    let bytes = text.as_bytes();
    let (mut out, mut i, mut line) = (Vec::new(), 0, 1u32);
    let is_word = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.');
    while i < bytes.len() {
        let c = bytes[i];
        if c == b'\n' {
            line += 1;
            i += 1;
        } else if c.is_ascii_whitespace() {
            i += 1;
        } else if bytes[i..].starts_with(b"//") {
            i += bytes[i..].iter().position(|&c| c == b'\n').unwrap_or(bytes.len() - i);
        } else if bytes[i..].starts_with(b"/*") {
            let end = text.get(i + 2..).and_then(|rest| rest.find("*/"));
            let Some(end) = end else { return error(line, "comment without end") };
            line += text[i..i + 2 + end].matches('\n').count() as u32;
            i += end + 4;
        } else if c == b'"' {
            let end = bytes[i + 1..].iter().position(|&c| c == b'"' || c == b'\n');
            match end {
                Some(end) if bytes[i + 1 + end] == b'"' => {
                    let text = String::from_utf8_lossy(&bytes[i..i + end + 2]).into_owned();
                    out.push(Token { text, line });
                    i += end + 2;
                }
                _ => return error(line, "string without end"),
            }
        } else if is_word(c) {
            let start = i;
            while i < bytes.len() && (is_word(bytes[i]) || bytes[i..].starts_with(b"::")) {
                i += if bytes[i] == b':' { 2 } else { 1 };
            }
            // `.reg.b32` is two words, `add.s32` one.
            if c == b'.'
                && let Some(dot) = bytes[start + 1..i].iter().position(|&c| c == b'.')
            {
                i = start + 1 + dot;
            }
            out.push(Token { text: String::from_utf8_lossy(&bytes[start..i]).into_owned(), line });
        } else if c.is_ascii() {
            out.push(Token { text: (c as char).to_string(), line });
            i += 1;
        } else {
            return error(line, "a character that is not ASCII");
        }
    }
    Ok(out)
}

/// Integer literals (decimal, hexadecimal, octal, binary, `U` suffix) and the `0f`/`0d` bit patterns of floats.
pub(super) fn literal(word: &str) -> Option<u64> {
    let word = word.strip_suffix('U').unwrap_or(word);
    // Unlike a PTX literal, what `from_str_radix` takes may begin with a sign.
    let radix = |digits: &str, radix| {
        digits.starts_with(|c: char| c.is_ascii_alphanumeric()).then(|| u64::from_str_radix(digits, radix).ok())?
    };
    match word.get(..2) {
        Some("0x" | "0X") => radix(&word[2..], 16),
        Some("0f" | "0F") if word.len() == 10 => radix(&word[2..], 16),
        Some("0d" | "0D") if word.len() == 18 => radix(&word[2..], 16),
        Some("0b" | "0B") => radix(&word[2..], 2),
        _ if word.len() > 1 && word.starts_with('0') => radix(word, 8),
        _ => word.parse().ok(),
    }
}
