//! PTX text to statements: functions, declarations, labels, instructions with their operands as written.
//!
//! PTX ISA, "Syntax" and "Source Format". Nothing is interpreted here; `decode` gives instructions their meaning.

mod declare;
mod lex;
mod location;

use std::collections::{HashMap, HashSet};

use crate::report::ParseError;
use lex::{Token, error, literal, tokens};
pub(crate) use location::Location;

/// One operand as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    /// `%r1`, `%tid.x`, a label or a variable.
    Name(String),
    /// An integer literal, or the bits of a float literal.
    Literal(u64),
    /// `[base + offset]`; a missing base is an absolute address.
    Address { base: Option<String>, offset: i64 },
    /// `[map, {x, y, …}]`: an element of the tensor that the map at `base + offset` describes.
    Tensor { base: String, offset: i64, coords: Vec<Operand> },
    /// `{a, b, …}`.
    Vector(Vec<Operand>),
    /// `!%p`.
    Not(String),
    /// `a|b`: a value with a predicate.
    Pair(String, String),
}

impl Operand {
    /// Adds the names in it.
    fn names<'a>(&'a self, names: &mut HashSet<&'a str>) {
        match self {
            Operand::Literal(_) | Operand::Address { base: None, .. } => {}
            Operand::Name(name) | Operand::Not(name) | Operand::Address { base: Some(name), .. } => {
                names.insert(name);
            }
            Operand::Pair(a, b) => names.extend([a.as_str(), b]),
            Operand::Vector(items) => items.iter().for_each(|item| item.names(names)),
            Operand::Tensor { base, coords, .. } => {
                names.insert(base);
                coords.iter().for_each(|item| item.names(names));
            }
        }
    }
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

/// A variable of the module with what it holds at first.
#[derive(Clone, Debug)]
pub(crate) struct Global {
    pub variable: Variable,
    pub constant: bool,
    /// Declared here, defined elsewhere.
    pub external: bool,
    pub bytes: Vec<u8>,
    pub relocations: Vec<Relocation>,
    pub line: u32,
}

/// `bytes` of the address of a symbol plus `addend`, at `offset`.
#[derive(Clone, Debug)]
pub(crate) struct Relocation {
    pub offset: usize,
    pub bytes: usize,
    pub symbol: String,
    pub addend: i64,
}

/// A `.entry` or `.func` with its body; register names are unique within it (inner scopes are renamed), and only those are kept
/// that a statement names: of the ranges that nvcc declares it may use a twentieth.
#[derive(Clone, Debug, Default)]
pub(crate) struct Function {
    pub name: String,
    /// A kernel, not a function.
    pub entry: bool,
    /// A `.func` without a body.
    pub external: bool,
    pub line: u32,
    pub params: Vec<Param>,
    pub results: Vec<Param>,
    /// `.param` variables of the body.
    pub temporaries: Vec<Param>,
    /// `.branchtargets` by label.
    pub targets: HashMap<String, Vec<String>>,
    pub registers: HashMap<String, RegType>,
    pub shared: Vec<Variable>,
    pub local: Vec<Variable>,
    pub labels: HashMap<String, usize>,
    pub body: Vec<Statement>,
    pub max_threads: Option<u32>,
    pub max_registers: Option<u32>,
    pub cluster: ClusterRule,
}

/// PTX ISA, "Cluster Dimension Directives".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClusterRule {
    /// `.reqnctapercluster`.
    pub required: Option<[u32; 3]>,
    /// `.maxclusterrank`.
    pub most: Option<u32>,
    /// `.explicitcluster`.
    pub explicit: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegType {
    Pred,
    Bits(u8),
}

#[derive(Debug, Default)]
pub(crate) struct Source {
    pub functions: Vec<Function>,
    pub shared: Vec<Variable>,
    pub globals: Vec<Global>,
    pub files: HashMap<u32, String>,
    pub locations: Vec<Location>,
    /// By label: what `.debug_str` holds.
    pub strings: HashMap<String, String>,
    pub target: String,
}

/// A `{ … }` inside a body: what it declares is renamed so that names are unique in the function.
#[derive(Default)]
struct Scope {
    id: u32,
    names: HashMap<String, String>,
}

/// Deepest nesting of `{ … }` in a body.
const MOST_SCOPES: usize = 64;
/// Deepest nesting of operands: `{a, b}` is 2.
const MOST_OPERANDS: usize = 4;
/// Most registers that a function may declare; what it may use is less.
const MOST_REGISTERS: usize = 1 << 18;

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    source: Source,
    location: u32,
    /// The last location with this file, line and column.
    places: HashMap<(u32, u32, u64), u32>,
    scopes: u32,
}

pub(crate) fn parse(text: &str) -> Result<Source, ParseError> {
    let mut source = Source { locations: vec![Location::default()], ..Source::default() };
    source.target = "unknown".to_owned();
    let mut parser = Parser { tokens: tokens(text)?, at: 0, source, location: 0, places: HashMap::new(), scopes: 0 };
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
            ".section" if self.accept(".debug_str") => self.strings()?,
            ".section" => {
                self.next()?;
                self.skip_block()?;
            }
            ".visible" | ".extern" | ".weak" | ".common" => {}
            ".entry" => self.function(true, line)?,
            ".func" => self.function(false, line)?,
            ".shared" => {
                let dynamic = self.at >= 2 && self.tokens[self.at - 2].text == ".extern";
                let variable = self.variable(dynamic)?;
                self.source.shared.push(variable);
            }
            ".global" | ".const" => {
                let external = self.at >= 2 && self.tokens[self.at - 2].text == ".extern";
                let global = self.global(word == ".const", external)?;
                self.source.globals.push(global);
            }
            ".pragma" => self.skip_to(";")?,
            _ => return error(line, format!("`{word}` is not implemented at module level")),
        }
        Ok(())
    }

    fn body_item(&mut self, function: &mut Function, scopes: &mut Vec<Scope>) -> Result<(), ParseError> {
        let line = self.line();
        let word = self.next()?;
        match word.as_str() {
            "{" => {
                if scopes.len() >= MOST_SCOPES {
                    return error(line, format!("blocks nested deeper than {MOST_SCOPES}"));
                }
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
            ".param" => self.temporary(function, scopes)?,
            ".loc" => self.loc()?,
            ".pragma" => self.skip_to(";")?,
            // What a call through a register may reach: such a call is an error of its own.
            ".calltargets" | ".callprototype" => self.skip_to(";")?,
            _ if self.peek() == ":" => {
                self.at += 1;
                if self.accept(".branchtargets") {
                    return self.branch_targets(function, scopes, word);
                }
                if matches!(self.peek(), ".calltargets" | ".callprototype") {
                    return self.skip_to(";");
                }
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
                if count as usize > MOST_REGISTERS {
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
                if function.registers.len() > MOST_REGISTERS {
                    return error(line, format!("more than {MOST_REGISTERS} registers"));
                }
            }
            if !self.accept(",") {
                break;
            }
        }
        self.expect(";")
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
                operands.push(self.operand(&resolve, 0)?);
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

    fn operand(&mut self, resolve: &impl Fn(String) -> String, depth: usize) -> Result<Operand, ParseError> {
        if depth == MOST_OPERANDS {
            return error(self.line(), format!("operands nested deeper than {MOST_OPERANDS}"));
        }
        // `(…)`: the arguments of a call.
        for (open, close) in [("{", "}"), ("(", ")")] {
            if self.accept(open) {
                let mut items = Vec::new();
                while !self.accept(close) {
                    items.push(self.operand(resolve, depth + 1)?);
                    if !self.accept(",") && self.peek() != close {
                        return error(self.line(), format!("expected `,` or `{close}`, found `{}`", self.peek()));
                    }
                }
                return Ok(Operand::Vector(items));
            }
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
            if let Some(base) = base.clone()
                && self.accept(",")
            {
                let Operand::Vector(coords) = self.operand(resolve, depth + 1)? else {
                    return error(self.line(), "expected coordinates in braces");
                };
                self.expect("]")?;
                return Ok(Operand::Tensor { base, offset, coords });
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
