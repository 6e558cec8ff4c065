//! Declarations: functions with their parameters, variables with what they hold at first.

use std::collections::HashSet;

use super::lex::{error, literal};
use super::{Function, Global, Param, Parser, Relocation, Scope, Variable};
use crate::report::ParseError;

/// Bytes that the initialised variables of a module may have together.
const MOST_BYTES: usize = 256 << 20;

impl Parser {
    pub(super) fn type_bytes(&self, word: &str) -> Result<u32, ParseError> {
        Ok(match word {
            ".b8" | ".u8" | ".s8" => 1,
            ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => 2,
            ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => 4,
            ".b64" | ".u64" | ".s64" | ".f64" => 8,
            _ => return error(self.line(), format!("`{word}` is not a type")),
        })
    }

    /// `[.align n] .type name[[count]]` after the state space; also whether a dimension is open, and the element's size.
    fn declarator(&mut self) -> Result<(Variable, bool, u32), ParseError> {
        let mut align = None;
        let mut vector = 1;
        let element = loop {
            let word = self.next()?;
            match word.as_str() {
                ".align" => align = Some(self.small_number()?),
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                ".attribute" => return error(self.line(), "`.attribute` is not implemented"),
                _ => break self.type_bytes(&word)?,
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
        let align = align.unwrap_or(element * vector);
        if !align.is_power_of_two() || align > 1 << 12 {
            return error(line, format!("alignment {align} is not a power of two up to 4096"));
        }
        // So that no sum of such sizes and alignments overflows.
        let bytes = (element * vector).checked_mul(count).filter(|bytes| *bytes <= 1 << 30);
        let Some(bytes) = bytes else { return error(line, "array too large") };
        Ok((Variable { name, align, bytes, dynamic: false }, open, element))
    }

    /// A variable of a kernel's shared or local memory, which cannot be initialised.
    pub(super) fn variable(&mut self, dynamic: bool) -> Result<Variable, ParseError> {
        let line = self.line();
        let (mut variable, open, _) = self.declarator()?;
        self.expect(";")?;
        if open && !dynamic {
            return error(line, format!("`{}` has no size", variable.name));
        }
        variable.dynamic = open;
        variable.bytes = if open { 0 } else { variable.bytes };
        Ok(variable)
    }

    /// `.global` and `.const` with `= value` or `= {…}`. PTX ISA, "Initializers": what is left out is zero.
    pub(super) fn global(&mut self, constant: bool, external: bool) -> Result<Global, ParseError> {
        let line = self.line();
        let (mut variable, open, element) = self.declarator()?;
        let mut global =
            Global { variable: variable.clone(), constant, external, bytes: Vec::new(), relocations: Vec::new(), line };
        if self.accept("=") {
            self.initialiser(&mut global, element as usize, 0)?;
        }
        self.expect(";")?;
        if open {
            variable.bytes = global.bytes.len() as u32;
        }
        if global.bytes.len() > variable.bytes as usize {
            let (given, size) = (global.bytes.len(), variable.bytes);
            return error(line, format!("`{}` of {size} bytes is initialised with {given}", variable.name));
        }
        let others: usize = self.source.globals.iter().map(|global| global.variable.bytes as usize).sum();
        if others + variable.bytes as usize > MOST_BYTES {
            return error(line, format!("the variables of the module have more than {MOST_BYTES} bytes"));
        }
        global.variable = variable;
        Ok(global)
    }

    fn initialiser(&mut self, global: &mut Global, element: usize, depth: usize) -> Result<(), ParseError> {
        if !self.accept("{") {
            return self.initial_value(global, element);
        }
        if depth == 8 {
            return error(self.line(), "initialisers nested deeper than 8");
        }
        while !self.accept("}") {
            self.initialiser(global, element, depth + 1)?;
            if !self.accept(",") && self.peek() != "}" {
                return error(self.line(), format!("expected `,` or `}}`, found `{}`", self.peek()));
            }
        }
        Ok(())
    }

    /// A number, `symbol [+ n]`, `generic(symbol) [+ n]` or `mask(symbol)`: a byte of an address.
    fn initial_value(&mut self, global: &mut Global, element: usize) -> Result<(), ParseError> {
        let line = self.line();
        if self.peek() == "-" || (literal(self.peek()).is_some() && self.tokens_after(1) != "(") {
            let value = self.number()?;
            global.bytes.extend(&value.to_le_bytes()[..element]);
            return Ok(());
        }
        let word = self.next()?;
        if literal(&word).is_some() {
            return error(line, format!("a mask of an address (`{word}(…)`) is not implemented"));
        }
        let symbol = if word == "generic" && self.accept("(") {
            let symbol = self.next()?;
            self.expect(")")?;
            symbol
        } else {
            word
        };
        let mut addend = 0;
        if self.accept("+") || self.peek() == "-" {
            addend = self.number()? as i64;
        }
        if element < 8 {
            return error(line, format!("the address of `{symbol}` does not fit {element} bytes"));
        }
        global.relocations.push(Relocation { offset: global.bytes.len(), bytes: element, symbol, addend });
        global.bytes.extend([0; 8]);
        Ok(())
    }

    fn tokens_after(&self, by: usize) -> &str {
        self.tokens.get(self.at + by).map_or("", |token| token.text.as_str())
    }

    /// `(.param [.align n] .type name[[bytes]], …)`.
    fn params(&mut self) -> Result<Vec<Param>, ParseError> {
        let mut params = Vec::new();
        while !self.accept(")") {
            if self.peek() == ".reg" {
                return error(self.line(), "parameters in registers (`.reg`) are not implemented");
            }
            self.expect(".param")?;
            params.push(self.param()?);
            if !self.accept(",") && self.peek() != ")" {
                return error(self.line(), format!("expected `,` or `)`, found `{}`", self.peek()));
            }
        }
        Ok(params)
    }

    fn param(&mut self) -> Result<Param, ParseError> {
        let line = self.line();
        let mut align = None;
        let bytes = loop {
            let word = self.next()?;
            match word.as_str() {
                ".align" => align = Some(self.small_number()?),
                _ => break self.type_bytes(&word)?,
            }
        };
        // `.ptr [.space] [.align n]` speaks of what the parameter points to.
        if self.accept(".ptr") {
            let _space = [".global", ".shared", ".const", ".local"].into_iter().any(|space| self.accept(space));
            if self.accept(".align") {
                self.number()?;
            }
        }
        let mut param = Param { name: self.next()?, align: align.unwrap_or(bytes), bytes };
        if self.accept("[") {
            let count = self.small_number()?;
            param.bytes = match bytes.checked_mul(count).filter(|bytes| *bytes <= 1 << 16) {
                Some(bytes) => bytes,
                None => return error(line, format!("parameter `{}` too large", param.name)),
            };
            self.expect("]")?;
        }
        if !param.align.is_power_of_two() || param.align > 1 << 12 {
            return error(line, format!("alignment {} is not a power of two up to 4096", param.align));
        }
        Ok(param)
    }

    /// A `.param` variable of a body: an argument or a result of a call.
    pub(super) fn temporary(&mut self, function: &mut Function, scopes: &mut [Scope]) -> Result<(), ParseError> {
        let mut param = self.param()?;
        self.expect(";")?;
        if scopes.len() > 1
            && let Some(scope) = scopes.last_mut()
        {
            let unique = format!("{}@{}", param.name, scope.id);
            scope.names.insert(param.name, unique.clone());
            param.name = unique;
        }
        function.temporaries.push(param);
        Ok(())
    }

    /// `name: .branchtargets a, b, …;`
    pub(super) fn branch_targets(
        &mut self,
        function: &mut Function,
        scopes: &[Scope],
        name: String,
    ) -> Result<(), ParseError> {
        let resolve =
            |name: String| scopes.iter().rev().find_map(|scope| scope.names.get(&name).cloned()).unwrap_or(name);
        let mut targets = Vec::new();
        loop {
            targets.push(resolve(self.next()?));
            if self.accept(";") {
                break;
            }
            self.expect(",")?;
        }
        function.targets.insert(resolve(name), targets);
        Ok(())
    }

    /// `.entry name (…) {…}`, or `.func [(results)] name (…)` with a body or `;`.
    pub(super) fn function(&mut self, entry: bool, line: u32) -> Result<(), ParseError> {
        let mut function = Function { entry, line, ..Function::default() };
        self.location = 0;
        if !entry {
            // Attributes that say nothing about what the function computes.
            while self.accept(".noreturn") || self.accept(".unique") {}
            if self.accept("(") {
                function.results = self.params()?;
            }
        }
        function.name = self.next()?;
        if self.accept("(") {
            function.params = self.params()?;
        }
        loop {
            let line = self.line();
            match self.next()?.as_str() {
                "{" => break,
                ";" if !entry => {
                    function.external = true;
                    break;
                }
                ".noreturn" if !entry => {}
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
                ".maxclusterrank" => function.cluster.most = Some(self.small_number()?),
                ".explicitcluster" => function.cluster.explicit = true,
                ".reqnctapercluster" => {
                    let mut required = [1; 3];
                    for (axis, size) in required.iter_mut().enumerate() {
                        if axis > 0 && !self.accept(",") {
                            break;
                        }
                        *size = self.small_number()?;
                    }
                    function.cluster.required = Some(required);
                }
                ".minnctapersm" => {
                    self.number()?;
                }
                ".pragma" => self.skip_to(";")?,
                other => return error(line, format!("`{other}` is not implemented before a function's body")),
            }
        }
        if !function.external {
            let mut scopes = vec![Scope::default()];
            while !scopes.is_empty() {
                self.body_item(&mut function, &mut scopes)?;
            }
            let mut named = HashSet::new();
            for statement in &function.body {
                named.extend(statement.guard.iter().map(|(name, _)| name.as_str()));
                statement.operands.iter().for_each(|operand| operand.names(&mut named));
            }
            function.registers.retain(|name, _| named.contains(name.as_str()));
        }
        // A definition takes the place of its declaration.
        if let Some(at) = self.source.functions.iter().position(|other| other.name == function.name) {
            match (self.source.functions[at].external, function.external) {
                (true, false) => self.source.functions[at] = function,
                (_, true) => {}
                _ => return error(line, format!("`{}` is defined twice", function.name)),
            }
        } else {
            self.source.functions.push(function);
        }
        Ok(())
    }
}
