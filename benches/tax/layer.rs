//! A copy of a layer on the GPU: the calls that run on it.

use fused_lora::{Accumulate, Dtype, Error, LoraShape, Routing, raw};

use super::super::cublaslt::Product;
use super::super::feature::Feature;
use super::super::report::Op;

/// Device addresses of one copy of a layer; adapters have room for the largest rank.
#[derive(Clone, Copy)]
pub struct Layer {
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) h: u64,
    pub(super) dh: u64,
    pub(super) y: u64,
    pub(super) dy: u64,
    pub(super) dx: u64,
    pub(super) da: u64,
    pub(super) db: u64,
    /// N elements of f32: DoRA's gain, its magnitude and the gradient of that.
    pub(super) gain: u64,
    pub(super) magnitude: u64,
    pub(super) dm: u64,
    /// What calls with ranks from 1 on have.
    pub(super) feature: Feature,
    /// Of dropout.
    pub(super) seed: u64,
}

impl Layer {
    pub(super) fn dropout(&self, r: usize) -> Option<raw::Dropout> {
        let dropout = raw::Dropout { p: self.feature.dropout, seed: raw::Seed::Value { seed: self.seed, offset: 0 } };
        Some(dropout).filter(|_| dropout.p > 0.0 && r != 0)
    }

    /// One of the f32 vectors, of one projection.
    pub(super) fn vector(&self, r: usize, address: u64, at: usize, n: usize) -> Option<raw::Matrix> {
        Some(raw::Matrix::new(address + 4 * (at * n) as u64, 1, n)).filter(|_| self.feature.dora && r != 0)
    }

    /// Of N and ranks in all, those of one projection.
    pub(super) fn cut(&self, shape: LoraShape) -> LoraShape {
        LoraShape { n: shape.n / self.feature.projections, r: shape.r * self.feature.adapters, ..shape }
    }

    /// `routes`: the table of a batch of several adapters.
    pub(super) fn forward(
        &self,
        dtype: Dtype,
        shape: LoraShape,
        routes: Option<u64>,
    ) -> Result<raw::ForwardShared, Error> {
        let LoraShape { m, n, k, r } = self.cut(shape);
        let all = self.feature.projections;
        let projection = |at: usize| raw::ForwardProjection {
            w: raw::Matrix::new(self.w + 2 * (at * n * k) as u64, n, k),
            b: raw::Matrix::new(self.b + self.feature.factor_bytes() * (at * n * r) as u64, n, r),
            scale: 2.0,
            bias: None,
            gain: self.vector(r, self.gain, at, n),
            y: raw::Matrix { ptr: self.y + 2 * (at * n) as u64, rows: m, cols: n, row_stride: all * n },
        };
        Ok(raw::ForwardShared {
            dtype,
            x: raw::Matrix::new(self.x, m, k),
            f32_factors: self.feature.full && r != 0,
            a: raw::Matrix::new(self.a, all * r, k),
            h: Some(raw::Matrix::new(self.h, m, self.feature.columns_of_h(r))).filter(|_| r != 0),
            projections: raw::Projections::new(&(0..all).map(projection).collect::<Vec<_>>())?,
            dropout: self.dropout(r),
            routes: routes.filter(|_| r != 0).map(|at| raw::Matrix::new(at, 1, Routing::words_for(m))),
        })
    }

    pub(super) fn backward(
        &self,
        dtype: Dtype,
        shape: LoraShape,
        routes: Option<u64>,
    ) -> Result<raw::BackwardShared, Error> {
        let LoraShape { m, n, k, r } = self.cut(shape);
        let all = self.feature.projections;
        let gradient = |address, rows, cols| {
            Some(raw::Gradient { matrix: raw::Matrix::new(address, rows, cols), f32: true }).filter(|_| r != 0)
        };
        let columns = |address: u64, at| raw::Matrix {
            ptr: address + 2 * (at * n) as u64,
            rows: m,
            cols: n,
            row_stride: all * n,
        };
        let magnitude = |at: usize| {
            let (magnitude, dm) = self.vector(r, self.magnitude, at, n).zip(self.vector(r, self.dm, at, n))?;
            Some(raw::MagnitudeGradient { y: columns(self.y, at), bias: None, magnitude, dm })
        };
        let projection = |at: usize| raw::BackwardProjection {
            dy: columns(self.dy, at),
            w: raw::Matrix::new(self.w + 2 * (at * n * k) as u64, n, k),
            b: raw::Matrix::new(self.b + self.feature.factor_bytes() * (at * n * r) as u64, n, r),
            scale: 2.0,
            db: gradient(self.db + 4 * (at * n * r) as u64, n, r),
            dbias: None,
            dm: magnitude(at),
            gain: self.vector(r, self.gain, at, n),
        };
        Ok(raw::BackwardShared {
            dtype,
            f32_factors: self.feature.full && r != 0,
            a: raw::Matrix::new(self.a, all * r, k),
            x: Some(raw::Matrix::new(self.x, m, k)),
            h: Some(raw::Matrix::new(self.h, m, self.feature.columns_of_h(r))).filter(|_| r != 0),
            dx: Some(raw::Matrix::new(self.dx, m, k)),
            da: gradient(self.da, all * r, k),
            projections: raw::Projections::new(&(0..all).map(projection).collect::<Vec<_>>())?,
            accumulate: Accumulate::default(),
            dropout: self.dropout(r),
            routes: routes.filter(|_| r != 0).map(|at| raw::Matrix::new(at, 1, Routing::words_for(m))),
        })
    }

    /// The operation as separate products, with where each finds left, right and out. With R = 0 the plain one alone.
    pub(super) fn products(
        &self,
        op: Op,
        dtype: Dtype,
        LoraShape { m, n, k, r }: LoraShape,
    ) -> Vec<(Product, [u64; 3])> {
        let product = |rows, depth, columns, [left_transposed, right_transposed]: [bool; 2], alpha, beta| Product {
            rows,
            columns,
            depth,
            left_transposed,
            right_transposed,
            dtype,
            out: dtype,
            alpha,
            beta,
        };
        let gradient =
            |rows, columns| Product { out: Dtype::F32, ..product(rows, m, columns, [true, false], 1.0, 0.0) };
        match op {
            Op::Forward if r == 0 => vec![(product(m, k, n, [false, true], 1.0, 0.0), [self.x, self.w, self.y])],
            Op::Backward if r == 0 => vec![(product(m, n, k, [false; 2], 1.0, 0.0), [self.dy, self.w, self.dx])],
            Op::Forward => vec![
                (product(m, k, r, [false, true], 2.0, 0.0), [self.x, self.a, self.h]),
                (product(m, k, n, [false, true], 1.0, 0.0), [self.x, self.w, self.y]),
                (product(m, r, n, [false, true], 1.0, 1.0), [self.h, self.b, self.y]),
            ],
            Op::Backward => vec![
                (product(m, n, r, [false; 2], 2.0, 0.0), [self.dy, self.b, self.dh]),
                (product(m, n, k, [false; 2], 1.0, 0.0), [self.dy, self.w, self.dx]),
                (product(m, r, k, [false; 2], 1.0, 1.0), [self.dh, self.a, self.dx]),
                (gradient(r, k), [self.dh, self.x, self.da]),
                (gradient(n, r), [self.dy, self.h, self.db]),
            ],
        }
    }
}
