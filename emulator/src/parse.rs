//! PTX text to statements: functions, declarations, labels, instructions with their operands as written.
//!
//! PTX ISA, "Syntax" and "Source Format". Nothing is interpreted here; `decode` gives instructions their meaning.

use std::collections::HashMap;

use crate::report::ParseError;

/// One operand as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    /// `%r1`, `%tid.x`, a label or a variable.
    Name(String),
    /// An integer literal, or the bits of a float literal.
    Literal(u64),
    /// `[base + offset]`; a missing base is an absolute address.
    Address { base: Option<String>, offset: i64 },
    /// `{a, b, …}`.
    Vector(Vec<Operand>),
    /// `!%p`.
    Not(String),
    /// `a|b`: a value with a predicate.
    Pair(String, String),
}

#[derive(Clone, Debug)]
pub(crate) struct Statement {
    pub guard: Option<(String, bool)>,
    pub opcode: String,
    pub operands: Vec<Operand>,
    pub text: String,
    pub line: u32,
    pub location: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub name: String,
    pub align: u32,
    pub bytes: u32,
    /// `.extern .shared name[]`: the launch decides its size.
    pub dynamic: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Param {
    pub name: String,
    pub align: u32,
    pub bytes: u32,
}

/// A `.entry` with its body; register names are unique within it (inner scopes are renamed).
#[derive(Clone, Debug, Default)]
pub(crate) struct Function {
    pub name: String,
    pub params: Vec<Param>,
    pub registers: HashMap<String, RegType>,
    pub shared: Vec<Variable>,
    pub local: Vec<Variable>,
    pub labels: HashMap<String, usize>,
    pub body: Vec<Statement>,
    pub max_threads: Option<u32>,
    pub max_registers: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegType {
    Pred,
    Bits(u8),
}

/// A `.loc` with the chain of calls it is inlined in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Location {
    pub file: u32,
    pub line: u32,
    pub inlined_at: Option<(u32, u32)>,
}

#[derive(Debug, Default)]
pub(crate) struct Source {
    pub functions: Vec<Function>,
    pub shared: Vec<Variable>,
    pub files: HashMap<u32, String>,
    pub locations: Vec<Location>,
    pub target: String,
}

#[derive(Clone, Debug, PartialEq)]
struct Token {
    text: String,
    line: u32,
}

fn error<T>(line: u32, message: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError { line, message: message.into() })
}

/// Splits into words and single punctuation characters; comments vanish. A word keeps its dots, `%`, `$` and `::`.
fn tokens(text: &str) -> Result<Vec<Token>, ParseError> {
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
fn literal(word: &str) -> Option<u64> {
    let word = word.strip_suffix('U').unwrap_or(word);
    let radix = |digits: &str, radix| u64::from_str_radix(digits, radix).ok();
    match word.get(..2) {
        Some("0x" | "0X") => radix(&word[2..], 16),
        Some("0f" | "0F") if word.len() == 10 => radix(&word[2..], 16),
        Some("0d" | "0D") if word.len() == 18 => radix(&word[2..], 16),
        Some("0b" | "0B") => radix(&word[2..], 2),
        _ if word.len() > 1 && word.starts_with('0') => radix(word, 8),
        _ => word.parse().ok(),
    }
}

/// A `{ … }` inside a body: what it declares is renamed so that names are unique in the function.
#[derive(Default)]
struct Scope {
    id: u32,
    names: HashMap<String, String>,
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    source: Source,
    location: u32,
    scopes: u32,
}

pub(crate) fn parse(text: &str) -> Result<Source, ParseError> {
    let mut source = Source { locations: vec![Location::default()], ..Source::default() };
    source.target = "unknown".to_owned();
    let mut parser = Parser { tokens: tokens(text)?, at: 0, source, location: 0, scopes: 0 };
    while parser.at < parser.tokens.len() {
        parser.module_item()?;
    }
    Ok(parser.source)
}

impl Parser {
    fn peek(&self) -> &str {
        self.tokens.get(self.at).map_or("", |token| token.text.as_str())
    }

    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |token| token.line)
    }

    fn next(&mut self) -> Result<String, ParseError> {
        let Some(token) = self.tokens.get(self.at) else { return error(self.line(), "unexpected end of the text") };
        self.at += 1;
        Ok(token.text.clone())
    }

    fn accept(&mut self, text: &str) -> bool {
        let found = self.peek() == text;
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, text: &str) -> Result<(), ParseError> {
        if self.accept(text) {
            Ok(())
        } else {
            error(self.line(), format!("expected `{text}`, found `{}`", self.peek()))
        }
    }

    fn number(&mut self) -> Result<u64, ParseError> {
        let line = self.line();
        let negative = self.accept("-");
        let word = self.next()?;
        let Some(value) = literal(&word) else { return error(line, format!("expected a number, found `{word}`")) };
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    fn small_number(&mut self) -> Result<u32, ParseError> {
        let line = self.line();
        let value = self.number()?;
        u32::try_from(value).or_else(|_| error(line, format!("{value} is too large here")))
    }

    fn skip_to(&mut self, end: &str) -> Result<(), ParseError> {
        while self.next()? != end {}
        Ok(())
    }

    /// Skips a `{ … }` block, the opening brace included.
    fn skip_block(&mut self) -> Result<(), ParseError> {
        self.expect("{")?;
        let mut depth = 1;
        while depth > 0 {
            match self.next()?.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn module_item(&mut self) -> Result<(), ParseError> {
        let line = self.line();
        let word = self.next()?;
        match word.as_str() {
            ".version" | ".address_size" => {
                self.next()?;
            }
            ".target" => {
                self.source.target = self.next()?;
                while self.accept(",") {
                    self.next()?;
                }
            }
            ".file" => {
                let index = self.small_number()?;
                let name = self.next()?;
                self.source.files.insert(index, name.trim_matches('"').to_owned());
                while self.accept(",") {
                    self.number()?;
                }
            }
            ".section" => {
                self.next()?;
                self.skip_block()?;
            }
            ".visible" | ".extern" | ".weak" | ".common" => {}
            ".entry" => self.function()?,
            ".func" => return error(line, "device functions (.func) are not implemented"),
            ".shared" => {
                let dynamic = self.at >= 2 && self.tokens[self.at - 2].text == ".extern";
                let variable = self.variable(dynamic)?;
                self.source.shared.push(variable);
            }
            // Variables of a module are not implemented; an instruction that names one says so.
            ".global" | ".const" | ".pragma" => self.skip_to(";")?,
            _ => return error(line, format!("`{word}` is not implemented at module level")),
        }
        Ok(())
    }

    fn type_bytes(&self, word: &str) -> Result<u32, ParseError> {
        Ok(match word {
            ".b8" | ".u8" | ".s8" => 1,
            ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => 2,
            ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => 4,
            ".b64" | ".u64" | ".s64" | ".f64" => 8,
            _ => return error(self.line(), format!("`{word}` is not a type")),
        })
    }

    /// `[.align n] .type name[[count]] [= {…}];` after the state space.
    fn variable(&mut self, dynamic: bool) -> Result<Variable, ParseError> {
        let mut align = None;
        let mut vector = 1;
        let element = loop {
            let word = self.next()?;
            match word.as_str() {
                ".align" => align = Some(self.small_number()?),
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                _ => break self.type_bytes(&word)? * vector,
            }
        };
        let line = self.line();
        let name = self.next()?;
        let mut count = 1u32;
        let mut open = false;
        while self.accept("[") {
            if self.peek() == "]" {
                open = true;
            } else {
                count = count.checked_mul(self.small_number()?).map_or_else(|| error(line, "array too large"), Ok)?;
            }
            self.expect("]")?;
        }
        self.expect(";")?;
        let align = align.unwrap_or(element);
        if !align.is_power_of_two() || align > 1 << 12 {
            return error(line, format!("alignment {align} is not a power of two up to 4096"));
        }
        let bytes = element.checked_mul(count).map_or_else(|| error(line, "array too large"), Ok)?;
        if open && !dynamic {
            return error(line, format!("`{name}` has no size"));
        }
        Ok(Variable { name, align, bytes: if open { 0 } else { bytes }, dynamic: dynamic && open })
    }

    fn function(&mut self) -> Result<(), ParseError> {
        let mut function = Function { name: self.next()?, ..Function::default() };
        if self.accept("(") {
            while !self.accept(")") {
                self.expect(".param")?;
                let mut align = None;
                let bytes = loop {
                    let word = self.next()?;
                    match word.as_str() {
                        ".align" => align = Some(self.small_number()?),
                        ".ptr" | ".global" => {}
                        _ => break self.type_bytes(&word)?,
                    }
                };
                let mut param = Param { name: self.next()?, align: align.unwrap_or(bytes), bytes };
                if self.accept("[") {
                    param.bytes = self.small_number()?;
                    self.expect("]")?;
                }
                function.params.push(param);
                self.accept(",");
            }
        }
        loop {
            let line = self.line();
            match self.next()?.as_str() {
                "{" => break,
                ".maxntid" | ".reqntid" => {
                    let mut threads = 1u32;
                    loop {
                        threads = threads.saturating_mul(self.small_number()?);
                        if !self.accept(",") {
                            break;
                        }
                    }
                    function.max_threads = Some(threads);
                }
                ".maxnreg" => function.max_registers = Some(self.small_number()?),
                ".minnctapersm" | ".maxclusterrank" => {
                    self.number()?;
                }
                ".pragma" => self.skip_to(";")?,
                other => return error(line, format!("`{other}` is not implemented before a kernel's body")),
            }
        }
        let mut scopes = vec![Scope::default()];
        while !scopes.is_empty() {
            self.body_item(&mut function, &mut scopes)?;
        }
        self.source.functions.push(function);
        Ok(())
    }

    fn body_item(&mut self, function: &mut Function, scopes: &mut Vec<Scope>) -> Result<(), ParseError> {
        let line = self.line();
        let word = self.next()?;
        match word.as_str() {
            "{" => {
                self.scopes += 1;
                scopes.push(self.open_scope());
            }
            "}" => {
                scopes.pop();
            }
            ".reg" => self.registers(function, scopes)?,
            ".shared" => {
                let variable = self.variable(false)?;
                function.shared.push(variable);
            }
            ".local" => {
                let variable = self.variable(false)?;
                function.local.push(variable);
            }
            ".loc" => self.loc()?,
            ".pragma" => self.skip_to(";")?,
            _ if self.peek() == ":" => {
                self.at += 1;
                let name = scopes.last().and_then(|scope| scope.names.get(&word)).unwrap_or(&word).clone();
                if function.labels.insert(name, function.body.len()).is_some() {
                    return error(line, format!("label `{word}` is defined twice"));
                }
            }
            _ if word.starts_with('.') => {
                return error(line, format!("`{word}` is not implemented in a kernel's body"));
            }
            _ => {
                self.at -= 1;
                let statement = self.statement(scopes)?;
                function.body.push(statement);
            }
        }
        Ok(())
    }

    /// Labels inside an asm block are local to it and may be used before they stand.
    fn open_scope(&self) -> Scope {
        let mut scope = Scope { id: self.scopes, names: HashMap::new() };
        let mut depth = 1;
        for pair in self.tokens[self.at..].windows(2) {
            match pair[0].text.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                name if depth == 1 && pair[1].text == ":" => {
                    scope.names.insert(name.to_owned(), format!("{name}@{}", scope.id));
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
        scope
    }

    fn registers(&mut self, function: &mut Function, scopes: &mut [Scope]) -> Result<(), ParseError> {
        let word = self.next()?;
        let kind = if word == ".pred" { RegType::Pred } else { RegType::Bits(self.type_bytes(&word)? as u8) };
        let inner = scopes.len() > 1;
        loop {
            let line = self.line();
            let name = self.next()?;
            let names = if self.accept("<") {
                let count = self.small_number()?;
                self.expect(">")?;
                if count > 1 << 20 {
                    return error(line, format!("{count} registers `{name}` are too many"));
                }
                (0..count).map(|i| format!("{name}{i}")).collect()
            } else {
                vec![name]
            };
            for name in names {
                let mut unique = name.clone();
                if inner && let Some(scope) = scopes.last_mut() {
                    unique = format!("{name}@{}", scope.id);
                    scope.names.insert(name, unique.clone());
                }
                function.registers.insert(unique, kind);
            }
            if !self.accept(",") {
                break;
            }
        }
        self.expect(";")
    }

    fn loc(&mut self) -> Result<(), ParseError> {
        let (file, line) = (self.small_number()?, self.small_number()?);
        self.number()?;
        let mut location = Location { file, line, inlined_at: None };
        while self.accept(",") {
            match self.next()?.as_str() {
                "function_name" => {
                    self.next()?;
                }
                "inlined_at" => {
                    location.inlined_at = Some((self.small_number()?, self.small_number()?));
                    self.number()?;
                }
                other => return error(self.line(), format!("`.loc … {other}` is not known")),
            }
        }
        self.location = self.source.locations.len() as u32;
        self.source.locations.push(location);
        Ok(())
    }

    fn statement(&mut self, scopes: &[Scope]) -> Result<Statement, ParseError> {
        let (start, line) = (self.at, self.line());
        let resolve =
            |name: String| scopes.iter().rev().find_map(|scope| scope.names.get(&name).cloned()).unwrap_or(name);
        let mut guard = None;
        if self.accept("@") {
            let negated = self.accept("!");
            guard = Some((resolve(self.next()?), negated));
        }
        let opcode = self.next()?;
        let mut operands = Vec::new();
        if !self.accept(";") {
            loop {
                operands.push(self.operand(&resolve)?);
                if self.accept(";") {
                    break;
                }
                self.expect(",")?;
            }
        }
        let text = self.tokens[start..self.at - 1].iter().fold(String::new(), |mut text, token| {
            let tight = text.is_empty() || matches!(token.text.as_str(), "," | "]" | "}" | ")");
            let open = text.ends_with(['[', '{', '@', '!', '-', '+']) || matches!(token.text.as_str(), "+");
            if !tight && !open {
                text.push(' ');
            }
            text.push_str(&token.text);
            text
        });
        Ok(Statement { guard, opcode, operands, text, line, location: self.location })
    }

    fn operand(&mut self, resolve: &impl Fn(String) -> String) -> Result<Operand, ParseError> {
        if self.accept("{") {
            let mut items = Vec::new();
            while !self.accept("}") {
                items.push(self.operand(resolve)?);
                self.accept(",");
            }
            return Ok(Operand::Vector(items));
        }
        if self.accept("!") {
            return Ok(Operand::Not(resolve(self.next()?)));
        }
        if self.accept("[") {
            let mut base = None;
            let mut offset = 0i64;
            if literal(self.peek()).is_some() || self.peek() == "-" {
                offset = self.number()? as i64;
            } else {
                base = Some(resolve(self.next()?));
            }
            // A minus sign belongs to the number.
            if self.accept("+") || self.peek() == "-" {
                offset = offset.wrapping_add(self.number()? as i64);
            }
            self.expect("]")?;
            return Ok(Operand::Address { base, offset });
        }
        if self.peek() == "-" || literal(self.peek()).is_some() {
            return Ok(Operand::Literal(self.number()?));
        }
        let name = resolve(self.next()?);
        if self.accept("|") {
            return Ok(Operand::Pair(name, resolve(self.next()?)));
        }
        Ok(Operand::Name(name))
    }
}
