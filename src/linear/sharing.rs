//! What layers that share x compute, in one launch. A layer alone is the case of one.

use super::factor::{Copies, Factor, Put, columns_of_h, each_b};
use super::pass::{Made, Routed};
use super::{Backend, Buffers, LoraLinear, Operands, Pass, Training, elements};
use crate::error::{Error, Result};
use crate::raw::named;
use crate::{
    Accumulate, BackwardProjection, BackwardShared, Dropout, Element, Factors, ForwardProjection, ForwardShared,
    Gradient, MagnitudeGradient, Matrix, MatrixMut,
};

/// Columns of y that a forward pass computes where h is all that is wanted of it: a row of 16 bytes at least.
pub(super) const COLUMNS: usize = 8;

/// Layers that share x.
pub(super) struct Sharing<'s, 'a, B: Backend, T: Element> {
    pub(super) backend: &'a B,
    /// One at least.
    pub(super) layers: &'s [&'a LoraLinear<B, T>],
    /// The A of several.
    pub(super) stack: Option<&'a Stack<B, T>>,
    /// What rows go through in place of active adapters; for one layer alone.
    pub(super) routed: Option<Routed<'a, B, T>>,
}

/// What a launch reads of them: A of all, and the operands of each.
type Read<'a, B, T> = (Factor<'a, B, T>, Vec<Operands<'a, B, T>>);

/// The same with every B in the type of A.
type ReadAs<'a, B, T, A> =
    (Matrix<'a, <B as Backend>::Read<A>>, Vec<(Operands<'a, B, T>, Matrix<'a, <B as Backend>::Read<A>>)>);

/// What backward writes for all.
struct Outputs<'a, B: Backend, T: Element> {
    dx: Option<MatrixMut<'a, B::Write<T>>>,
    da: Option<MatrixMut<'a, B::Write<f32>>>,
    accumulate: Accumulate,
}

/// What backward reads and writes of one of them.
pub(super) struct Part<'a, B: Backend, T: Element> {
    pub(super) dy: Matrix<'a, B::Read<T>>,
    pub(super) db: Option<MatrixMut<'a, B::Write<f32>>>,
    pub(super) dbias: Option<MatrixMut<'a, B::Write<f32>>>,
    pub(super) dm: Option<super::Magnitude<'a, B, T>>,
}

impl<'a, B: Backend, T: Element> Sharing<'_, 'a, B, T> {
    fn read(
        &self,
        operation: &'static str,
        of: impl Fn(usize, &'a LoraLinear<B, T>) -> Result<Operands<'a, B, T>>,
    ) -> Result<Read<'a, B, T>> {
        self.check_backends(operation)?;
        let mut operands = Vec::with_capacity(self.layers.len());
        for (at, layer) in self.layers.iter().enumerate() {
            operands.push(of(at, layer).map_err(|error| self.located(at, error))?);
        }
        let a = match (self.stack, &operands[..]) {
            (Some(stack), _) if self.routed.is_none() => stack.view(operation, &operands)?,
            (_, [one]) => one.a,
            (_, all) => return Err(Error::Projections { got: all.len(), limit: 1 }),
        };
        Ok((a, operands))
    }

    /// All layers must be on the backend that computes.
    fn check_backends(&self, operation: &'static str) -> Result<()> {
        match self.layers.iter().position(|layer| !layer.backend.is_same(self.backend)) {
            Some(at) => {
                let got = format!("layer {at} is on another backend than the group");
                Err(Error::State { operation, got, expected: "layers on clones of one" })
            }
            None => Ok(()),
        }
    }

    /// Says which layer it is whose state rules something out.
    fn located(&self, at: usize, error: Error) -> Error {
        match error {
            Error::State { operation, got, expected } if self.layers.len() > 1 => {
                Error::State { operation, got: format!("in layer {at} {got}"), expected }
            }
            error => error,
        }
    }

    pub(super) fn forward(
        &self,
        x: Matrix<'_, B::Read<T>>,
        ys: impl IntoIterator<Item = MatrixMut<'a, B::Write<T>>>,
    ) -> Result<()> {
        let read = self.read("forward", |_, layer| match self.routed {
            Some(routed) => layer.routed_operands("forward_routed", routed, x.rows),
            None => layer.operands("forward"),
        })?;
        self.launch(read, x, None, ys, None)
    }

    fn launch<'o>(
        &self,
        (a, operands): Read<'_, B, T>,
        x: Matrix<'_, B::Read<T>>,
        h: Option<MatrixMut<'_, B::Write<T>>>,
        ys: impl IntoIterator<Item = MatrixMut<'o, B::Write<T>>>,
        dropout: Option<Dropout<'_, B::Words>>,
    ) -> Result<()>
    where
        B: 'o,
    {
        match a {
            Factor::Storage(a) => self.launch_as::<T>((a, each_b(operands, Factor::in_storage)?), x, h, ys, dropout),
            Factor::F32(a) => self.launch_as::<f32>((a, each_b(operands, |b| b.in_f32(a))?), x, h, ys, dropout),
        }
    }

    fn launch_as<'o, A: Element>(
        &self,
        (a, operands): ReadAs<'_, B, T, A>,
        x: Matrix<'_, B::Read<T>>,
        h: Option<MatrixMut<'_, B::Write<T>>>,
        ys: impl IntoIterator<Item = MatrixMut<'o, B::Write<T>>>,
        dropout: Option<Dropout<'_, B::Words>>,
    ) -> Result<()>
    where
        B: 'o,
    {
        let projection =
            |((Operands { w, scale, bias, gain, .. }, b), y)| ForwardProjection { w, b, scale, bias, gain, y };
        let projections = operands.into_iter().zip(ys).map(projection).collect();
        self.backend.forward_shared::<T, A>(ForwardShared { x, a, h, projections, dropout, routes: self.table() })
    }

    fn table(&self) -> Option<Matrix<'a, B::Words>> {
        self.routed.map(|routed| routed.routes.view())
    }

    pub(super) fn forward_train<'x>(
        &self,
        x: Matrix<'x, B::Read<T>>,
        ys: impl IntoIterator<Item = MatrixMut<'a, B::Write<T>>>,
        training: Training<'x, B>,
    ) -> Result<Pass<'x, B, T>> {
        let operation = "forward_train";
        let read = self.read(operation, |_, layer| {
            if let Some(routed) = self.routed {
                return layer.routed_operands("forward_routed_train", routed, x.rows);
            }
            layer.check_unmerged(operation)?;
            layer.trained(operation)?;
            layer.operands(operation)
        })?;
        let dropout = self.undropped(&read.1, training.dropout)?;
        let columns = columns_of_h(read.0, &read.1);
        let mut h = match columns {
            0 => None,
            _ if training.recompute => None,
            columns => Some(self.middle(x, columns)?),
        };
        let keep = h.as_mut().map(|h| MatrixMut::new(B::write(h), x.rows, columns));
        self.launch(read, x, keep, ys, dropout)?;
        let made = self.layers.iter().map(|layer| match self.routed {
            Some(_) => Made { adapter: None, ..layer.made() },
            None => layer.made(),
        });
        Ok(Pass::new(x, dropout, h, columns, made.collect()))
    }

    /// Of dropout with DoRA nothing remains, or it is refused: it would drop from x for W, too.
    fn undropped<'d>(
        &self,
        operands: &[Operands<'_, B, T>],
        dropout: Option<Dropout<'d, B::Words>>,
    ) -> Result<Option<Dropout<'d, B::Words>>> {
        let (Some(Dropout { p, .. }), Some(at)) = (dropout, operands.iter().position(|of| of.gain.is_some())) else {
            return Ok(dropout);
        };
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::Probability { got: p });
        }
        if p == 0.0 {
            return Ok(None);
        }
        let name = self.layers[at].active().join("`, `");
        let got = format!("adapter `{name}` has a magnitude (DoRA) and dropout is {p}");
        let expected = "dropout of 0: together they are not computed";
        Err(self.located(at, Error::State { operation: "forward_train", got, expected }))
    }

    /// A buffer for h. The rows of y are those of x, or the operation is refused; both buffers bound them.
    fn middle(&self, x: Matrix<'_, B::Read<T>>, columns: usize) -> Result<B::Buffer<T>> {
        self.layers.first().map_or(Ok(()), |layer| layer.check_input(x))?;
        self.backend.alloc::<T>(elements("the number of elements of h", x.rows, columns)?)
    }

    pub(super) fn backward(
        &self,
        pass: &Pass<'_, B, T>,
        dx: Option<MatrixMut<'_, B::Write<T>>>,
        da: Option<MatrixMut<'_, B::Write<f32>>>,
        parts: impl IntoIterator<Item = Part<'a, B, T>>,
        accumulate: Accumulate,
    ) -> Result<()> {
        let (a, operands) = self.read_of(pass)?;
        let outputs = Outputs { dx, da, accumulate };
        match a {
            Factor::Storage(a) => {
                self.backward_as::<T>(pass, (a, each_b(operands, Factor::in_storage)?), outputs, parts)
            }
            Factor::F32(a) => self.backward_as::<f32>(pass, (a, each_b(operands, |b| b.in_f32(a))?), outputs, parts),
        }
    }

    fn backward_as<A: Element>(
        &self,
        pass: &Pass<'_, B, T>,
        (a, operands): ReadAs<'_, B, T, A>,
        Outputs { dx, da, accumulate }: Outputs<'_, B, T>,
        parts: impl IntoIterator<Item = Part<'a, B, T>>,
    ) -> Result<()> {
        let Pass { x, dropout, ref kept, .. } = *pass;
        let (count, columns, tokens) = (self.layers.len(), kept.columns, kept.tokens);
        let mut projections = Vec::with_capacity(count);
        for (at, (Part { dy, db, dbias, dm }, (of, b))) in parts.into_iter().zip(operands).enumerate() {
            if dy.rows != tokens {
                return Err(Error::Dimension {
                    arg: named("dy", at, count),
                    axis: "rows",
                    got: dy.rows,
                    expected: tokens,
                });
            }
            let Operands { w, scale, bias, gain, .. } = of;
            let dm = match dm {
                Some(super::Magnitude { y, dm }) => {
                    let magnitude = self.layers[at].magnitude_of(kept.layers[at]);
                    let magnitude = magnitude.map_err(|error| self.located(at, error))?;
                    Some(MagnitudeGradient { y, bias, magnitude, dm })
                }
                None => None,
            };
            let (db, dbias) = (db.map(Gradient::F32), dbias.map(Gradient::F32));
            projections.push(BackwardProjection { dy, w, b, scale, db, dbias, dm, gain });
        }
        let wanted = projections.iter().any(|of| of.db.is_some());
        let again = if kept.h.is_none() && columns != 0 && wanted { Some(self.middle_of(pass)?) } else { None };
        let h = match (kept.h.as_ref().or(again.as_ref()), projections.first()) {
            (Some(h), _) => Some(Matrix::new(B::read(h), tokens, columns)),
            // Without ranks it lies nowhere in particular.
            (None, Some(of)) if columns == 0 => {
                Some(Matrix { rows: tokens, cols: 0, row_stride: 0, offset: 0, ..of.dy })
            }
            _ => None,
        };
        let da = da.map(Gradient::F32);
        let (x, routes) = (Some(x), self.table());
        self.backend.backward_shared::<T, A>(BackwardShared {
            a,
            x,
            h,
            dx,
            da,
            projections,
            accumulate,
            dropout,
            routes,
        })
    }

    /// What forward read when it made the pass.
    fn read_of(&self, pass: &Pass<'_, B, T>) -> Result<Read<'a, B, T>> {
        let (operation, made) = ("backward", &pass.kept.layers);
        if made.len() != self.layers.len() {
            let got = format!("the pass is of {} layers that share x, not of {}", made.len(), self.layers.len());
            return Err(Error::State { operation, got, expected: "a pass of as many" });
        }
        if self.routed.is_none() && pass.routed.is_some() {
            let got = "the rows of the pass went through a bank".to_owned();
            return Err(Error::State { operation, got, expected: "`backward` of its layer" });
        }
        self.read(operation, |at, layer| match self.routed {
            Some(routed) => {
                layer.check_base(made[at])?;
                layer.routed_operands(operation, routed, pass.kept.tokens)
            }
            None => {
                layer.check_unmerged(operation)?;
                layer.operands_of(made[at])
            }
        })
    }

    /// h of a pass that kept none: that of a forward pass to a few columns of y.
    fn middle_of(&self, pass: &Pass<'_, B, T>) -> Result<B::Buffer<T>> {
        let (x, tokens, columns_of_h) = (pass.x, pass.kept.tokens, pass.kept.columns);
        let (a, mut operands) = self.read_of(pass)?;
        let mut ys = Vec::with_capacity(operands.len());
        for Operands { w, b, bias, gain, .. } in &mut operands {
            let columns = w.rows.min(COLUMNS);
            (w.rows, *b, *bias, *gain) = (columns, b.with_rows(columns), None, None);
            let y = self.backend.alloc::<T>(elements("the number of elements of y", tokens, columns)?)?;
            ys.push((y, columns));
        }
        let mut h = self.middle(x, columns_of_h)?;
        let keep = Some(MatrixMut::new(B::write(&mut h), tokens, columns_of_h));
        let ys = ys.iter_mut().map(|(y, columns)| MatrixMut::new(B::write(y), tokens, *columns));
        self.launch((a, operands), x, keep, ys, pass.dropout)?;
        Ok(h)
    }
}

/// The A of several layers below each other, copied.
pub(super) struct Stack<B: Backend, T: Element> {
    /// A, and a row of B, which is copied beside it.
    a: Copies<B, T>,
    k: usize,
    /// What was copied of each layer: its version and its ranks. Empty where that failed.
    copied: Vec<(Option<u64>, usize)>,
}

impl<B: Backend, T: Element> Stack<B, T> {
    pub(super) fn new(backend: &B, layers: &[&LoraLinear<B, T>]) -> Result<Self> {
        let mut stack = Self { a: Copies::new(backend, (1, 0, 0), false, false)?, k: 0, copied: Vec::new() };
        stack.refresh(backend, layers)?;
        Ok(stack)
    }

    /// Copies what has changed.
    pub(super) fn refresh(&mut self, backend: &B, layers: &[&LoraLinear<B, T>]) -> Result<()> {
        let sharing = Sharing { backend, layers, stack: None, routed: None };
        sharing.check_backends("refresh")?;
        let each = layers.iter().enumerate();
        let operands = each.map(|(at, layer)| layer.operands("refresh").map_err(|error| sharing.located(at, error)));
        let operands = operands.collect::<Result<Vec<_>>>()?;
        let is_full = operands.iter().any(|of| matches!(of.a, Factor::F32(_)));
        let differs = |of: &Operands<'_, B, T>| is_full && matches!(of.a, Factor::Storage(a) if a.rows != 0);
        if let Some(at) = operands.iter().position(differs) {
            let got = format!("adapter `{}` is not at full precision, as others are", layers[at].active().join("`, `"));
            let expected = "adapters at full precision in every layer, or in none";
            return Err(sharing.located(at, Error::State { operation: "refresh", got, expected }));
        }
        let ranks = || operands.iter().map(|of| of.a.rows());
        let before = std::mem::take(&mut self.copied);
        let k = layers.first().map_or(0, |layer| layer.k);
        let moved = k != self.k || is_full != self.is_full() || !ranks().eq(before.iter().map(|of| of.1));
        self.k = k;
        if moved {
            self.a = Copies::new(backend, (1, k, ranks().sum()), is_full, false)?;
        }
        let mut first = 0;
        for (at, &Operands { a, b, version, .. }) in operands.iter().enumerate() {
            let r = a.rows();
            if r != 0 && (moved || before[at].0 != version) {
                let factors = match (a, b.with_rows(1)) {
                    (Factor::Storage(a), Factor::Storage(b)) => Factors::Storage { a, b },
                    (Factor::F32(a), Factor::F32(b)) => Factors::F32 { a, b },
                    _ => continue, // an adapter's are of one type
                };
                self.a.put(backend, first, r, Put { factors, scale: 1.0, divisor: None })?;
            }
            first += r;
        }
        self.copied = operands.iter().map(|of| (of.version, of.a.rows())).collect();
        Ok(())
    }

    /// Whether the adapters are at full precision.
    pub(super) fn is_full(&self) -> bool {
        matches!(self.a.buffers(), Buffers::F32 { .. })
    }

    /// The ranks of each layer.
    pub(super) fn ranks(&self) -> impl Iterator<Item = usize> {
        self.copied.iter().map(|of| of.1)
    }

    /// As an operation takes it, where it is that of the operands.
    fn view<'a>(&'a self, operation: &'static str, operands: &[Operands<'a, B, T>]) -> Result<Factor<'a, B, T>> {
        let differs = |(at, of): (usize, &Operands<'a, B, T>)| self.copied.get(at) != Some(&(of.version, of.a.rows()));
        let expected = "`refresh` first, and a pass of the adapters that it copied";
        match operands.iter().enumerate().position(differs) {
            Some(at) => {
                let got = format!("in layer {at} another adapter takes part than was copied, or it has changed");
                Err(Error::State { operation, got, expected })
            }
            None => Ok(self.a.read().0),
        }
    }
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// What it is in a pass that is made now.
    fn made(&self) -> Made {
        let adapter = self.trained("forward_train").ok().flatten().map(|named| named.version);
        Made { base: self.version, bias: self.bias_version, adapter }
    }
}
