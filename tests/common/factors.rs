//! Merge, round and gain over host buffers.

use fused_lora::{Element, Factors, cpu};

use super::data::Spec;
use super::{Host, HostForward, HostGradient};

/// A or B: in the storage type or in f32, as a gradient is.
pub type HostFactor<T> = HostGradient<T>;

fn factors<'a, T: Element>(a: &'a HostFactor<T>, b: &'a HostFactor<T>) -> Factors<'a, [T], [f32]> {
    match (a, b) {
        (HostGradient::Storage(a), HostGradient::Storage(b)) => Factors::Storage { a: a.view(), b: b.view() },
        (HostGradient::F32(a), HostGradient::F32(b)) => Factors::F32 { a: a.view(), b: b.view() },
        _ => unreachable!("both factors are of one type"),
    }
}

/// A and B of a spec; in f32 where its gradients are.
fn factors_of<T: Element>(spec: &Spec) -> (HostFactor<T>, HostFactor<T>) {
    if spec.f32_gradients {
        let HostForward { a, b, .. } = spec.forward::<f32>();
        (HostGradient::F32(a), HostGradient::F32(b))
    } else {
        let HostForward { a, b, .. } = spec.forward::<T>();
        (HostGradient::Storage(a), HostGradient::Storage(b))
    }
}

/// An output that lies as `like` does, poisoned.
fn output<T: Element>(like: &Host<T>) -> Host<T> {
    Host { data: vec![T::from_f32(super::data::POISON); like.data.len()], ..like.clone() }
}

/// Merge over host buffers; `merged` is written in place.
#[derive(Clone, Debug, PartialEq)]
pub struct HostMerge<T> {
    pub w: Option<Host<T>>,
    pub a: HostFactor<T>,
    pub b: HostFactor<T>,
    pub scale: f32,
    pub gain: Option<Host<f32>>,
    pub merged: Host<T>,
}

impl<T: Element> HostMerge<T> {
    pub fn new(spec: &Spec) -> Self {
        let w = spec.forward::<T>().w;
        let (a, b) = factors_of(spec);
        Self { merged: output(&w), w: Some(w), a, b, scale: spec.scale, gain: Some(spec.row_factors()) }
    }

    /// As the backends that compute on slices take it.
    pub fn views(&mut self) -> cpu::Merge<'_, T> {
        let Self { w, a, b, scale, gain, merged } = self;
        let w = w.as_ref().map(Host::view);
        let gain = gain.as_ref().map(Host::view);
        cpu::Merge { w, factors: factors(a, b), scale: *scale, gain, merged: merged.view_mut() }
    }
}

/// Round over host buffers; the outputs are written in place.
#[derive(Clone, Debug, PartialEq)]
pub struct HostRound<T> {
    pub a: HostFactor<T>,
    pub b: HostFactor<T>,
    pub scale: f32,
    pub divisor: Option<Host<f32>>,
    pub rounded_a: Host<T>,
    pub rounded_b: Host<T>,
}

impl<T: Element> HostRound<T> {
    pub fn new(spec: &Spec) -> Self {
        let HostForward { a: like_a, b: like_b, .. } = spec.forward::<T>();
        let (a, b) = factors_of(spec);
        let divisor = Some(spec.row_factors());
        Self { a, b, scale: spec.scale, divisor, rounded_a: output(&like_a), rounded_b: output(&like_b) }
    }

    /// As the backends that compute on slices take it.
    pub fn views(&mut self) -> cpu::Round<'_, T> {
        let Self { a, b, scale, divisor, rounded_a, rounded_b } = self;
        let (rounded_a, rounded_b) = (rounded_a.view_mut(), rounded_b.view_mut());
        let divisor = divisor.as_ref().map(Host::view);
        cpu::Round { factors: factors(a, b), scale: *scale, divisor, rounded_a, rounded_b }
    }
}

/// Gain over host buffers; the outputs are written in place.
#[derive(Clone, Debug, PartialEq)]
pub struct HostGain<T> {
    pub w: Host<T>,
    pub a: HostFactor<T>,
    pub b: HostFactor<T>,
    pub scale: f32,
    pub magnitude: Option<Host<f32>>,
    pub earlier: Option<Host<f32>>,
    pub norm: Option<Host<f32>>,
    pub gain: Option<Host<f32>>,
}

impl<T: Element> HostGain<T> {
    pub fn new(spec: &Spec) -> Self {
        let w = spec.forward::<T>().w;
        let (a, b) = factors_of(spec);
        let vector = spec.row_factors();
        let (norm, gain) = (Some(output(&vector)), Some(output(&vector)));
        Self { w, a, b, scale: spec.scale, magnitude: Some(vector.clone()), earlier: Some(vector), norm, gain }
    }

    /// As the backends that compute on slices take it.
    pub fn views(&mut self) -> cpu::Gain<'_, T> {
        let Self { w, a, b, scale, magnitude, earlier, norm, gain } = self;
        cpu::Gain {
            w: w.view(),
            factors: factors(a, b),
            scale: *scale,
            magnitude: magnitude.as_ref().map(Host::view),
            earlier: earlier.as_ref().map(Host::view),
            norm: norm.as_mut().map(Host::view_mut),
            gain: gain.as_mut().map(Host::view_mut),
        }
    }
}
