//! Keys of adapter_model.safetensors.

use super::{ErrorKind, Result};

/// What a tensor of an adapted module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    A,
    B,
    BBias,
    /// DoRA's.
    Magnitude,
    /// The base layer's bias.
    Bias,
    /// The base layer's weight.
    Weight,
}

impl Part {
    const ALL: [Self; 6] = [Self::A, Self::B, Self::BBias, Self::Magnitude, Self::Bias, Self::Weight];

    /// As PEFT writes it, and with the adapter's name left in, as in a state of the whole model.
    const fn suffixes(self) -> [&'static str; 2] {
        match self {
            Self::A => [".lora_A.weight", ".lora_A.default.weight"],
            Self::B => [".lora_B.weight", ".lora_B.default.weight"],
            Self::BBias => [".lora_B.bias", ".lora_B.default.bias"],
            Self::Magnitude => [".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"],
            Self::Bias => [".base_layer.bias"; 2],
            Self::Weight => [".base_layer.weight"; 2],
        }
    }
}

/// What a key stands for.
#[derive(Debug)]
pub(super) enum Key<'a> {
    /// A part of a module with factors.
    Module { module: &'a str, part: Part },
    /// A parameter of the base model, under its own name.
    Base { parameter: &'a str },
}

/// Within a key, what shows a feature that is not computed.
const UNSUPPORTED: &[(&str, &str)] = &[
    (".lora_embedding_A", "LoRA on an embedding"),
    (".lora_embedding_B", "LoRA on an embedding"),
    (".lora_diag", "KaSA"),
    (".token_adapter.", "trainable tokens"),
];

impl<'a> Key<'a> {
    pub(super) const PREFIX: &'static str = "base_model.model.";

    pub(super) fn name(module: &str, part: Part) -> String {
        let [suffix, _] = part.suffixes();
        format!("{}{module}{suffix}", Self::PREFIX)
    }

    pub(super) fn parse(key: &'a str, shape: &[usize]) -> Result<Self> {
        let unexpected = |because: &str| ErrorKind::Unexpected { tensor: key.to_owned(), because: because.to_owned() };
        let unsupported = |feature, expected| ErrorKind::Unsupported {
            key: key.to_owned(),
            got: format!("a tensor of shape {shape:?}"),
            feature,
            expected,
        };
        let Some(rest) = key.strip_prefix(Self::PREFIX) else {
            return Err(unexpected("it does not begin with `base_model.model.`").into());
        };
        if let Some((_, feature)) = UNSUPPORTED.iter().find(|(part, _)| rest.contains(part)) {
            return Err(unsupported(feature, "factors of linear modules only").into());
        }
        let module = |part: Part| {
            let module = part.suffixes().into_iter().find_map(|suffix| rest.strip_suffix(suffix))?;
            Some((module, part))
        };
        match Part::ALL.into_iter().find_map(module) {
            Some((module, _)) if module.contains(".base_layer") => {
                Err(unsupported("a LoRA layer within another", "factors of linear modules only").into())
            }
            Some((_, Part::A | Part::B | Part::Magnitude)) if shape.len() > 2 => {
                Err(unsupported("LoRA on a convolution", "a tensor of at most two dimensions").into())
            }
            Some((module, part)) => Ok(Self::Module { module, part }),
            // A module that is saved whole stands under its own name, without PEFT's wrapper.
            None if [".lora_", ".base_layer.", ".modules_to_save."].iter().any(|part| rest.contains(part)) => {
                Err(unexpected("no adapter that PEFT loads has such a tensor").into())
            }
            None => Ok(Self::Base { parameter: rest }),
        }
    }
}
