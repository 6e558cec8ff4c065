//! Simulated global memory: named allocations with exact bounds and a record of what was written.

use crate::shadow::Shadow;

/// An access to [`Memory`] that no allocation holds, or that reads what nothing wrote; an allocation that is too large.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Outside every allocation, or across an end.
    #[error("{bytes} bytes at {address:#x} are not inside an allocation{near}")]
    OutOfBounds {
        /// First byte.
        address: u64,
        /// Length.
        bytes: usize,
        /// The nearest allocation below, in words.
        near: String,
    },
    /// A read of bytes that nothing has written.
    #[error("byte {offset} of `{name}` (address {address:#x}) was never written")]
    Uninitialised {
        /// Allocation.
        name: String,
        /// Offset in it.
        offset: usize,
        /// Address of the byte.
        address: u64,
    },
    /// More than this machine can hold: each byte takes two, and more where it is accessed.
    #[error("out of memory: could not allocate the {bytes} bytes of `{name}`")]
    OutOfMemory {
        /// Allocation.
        name: String,
        /// Its size.
        bytes: usize,
    },
}

#[derive(Debug)]
pub(crate) struct Allocation {
    pub name: String,
    pub base: u64,
    pub data: Vec<u8>,
    /// One byte per byte: 0 while unwritten; 1, and 2 where a flag has been.
    pub written: Vec<u8>,
    pub shadow: Shadow,
    /// Kernels cannot write it.
    pub constant: bool,
}

/// Global memory of the simulated device.
#[derive(Debug)]
pub struct Memory {
    pub(crate) allocations: Vec<Allocation>,
    next: u64,
    last_hit: usize,
    /// Modules whose variables have been loaded, by where those begin: a hash of the text.
    modules: Vec<(u64, u64)>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

/// A variable of a module as it is at first.
#[derive(Clone, Debug)]
pub(crate) struct Preset {
    pub name: String,
    pub address: u64,
    pub data: Vec<u8>,
    pub constant: bool,
}

/// Lowest global address. Below lie the windows of shared and local memory.
pub(crate) const GLOBAL_BASE: u64 = 0x7f00_0000_0000;
/// Distance that separates allocations, so that an overrun never lands in a neighbour.
const GUARD: u64 = 4096;

impl Memory {
    /// Empty memory.
    pub fn new() -> Self {
        Memory { allocations: Vec::new(), next: GLOBAL_BASE, last_hit: 0, modules: Vec::new() }
    }

    /// As [`alloc`](Self::alloc), for sizes that may be too large.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`].
    pub fn try_alloc(&mut self, name: &str, bytes: usize) -> Result<u64, MemoryError> {
        // Given back at once: zeros that take no memory before they are touched cannot be asked for in a way that may fail.
        let (mut data, mut written) = (Vec::<u8>::new(), Vec::<u8>::new());
        let fits = data.try_reserve_exact(bytes).is_ok() && written.try_reserve_exact(bytes).is_ok();
        if !fits {
            return Err(MemoryError::OutOfMemory { name: name.to_owned(), bytes });
        }
        drop((data, written));
        Ok(self.alloc(name, bytes))
    }

    /// Allocates `bytes` unwritten bytes at a multiple of 256 and returns the address. Ends the process where there are not so
    /// many, see [`try_alloc`](Self::try_alloc).
    pub fn alloc(&mut self, name: &str, bytes: usize) -> u64 {
        self.alloc_with_offset(name, bytes, 0)
    }

    /// As [`alloc`](Self::alloc), but `offset` bytes past a multiple of 256: for kernels that claim to take any base.
    pub fn alloc_with_offset(&mut self, name: &str, bytes: usize, offset: usize) -> u64 {
        let base = self.next + offset as u64;
        self.next = (base + bytes as u64 + GUARD).next_multiple_of(256);
        self.allocations.push(Allocation {
            name: name.to_owned(),
            base,
            data: vec![0; bytes],
            written: vec![0; bytes],
            shadow: Shadow::default(),
            constant: false,
        });
        base
    }

    /// Puts the variables of a module at their addresses, unless they are there. Fails if another module's are.
    pub(crate) fn load(&mut self, base: u64, hash: u64, variables: &[Preset]) -> Result<(), String> {
        match self.modules.iter().find(|(other, _)| *other == base) {
            Some((_, other)) if *other == hash => return Ok(()),
            Some(_) => return Err("its variables meet those of another module in the same memory".to_owned()),
            None => self.modules.push((base, hash)),
        }
        for Preset { name, address, data, constant } in variables {
            let at = self.allocations.partition_point(|allocation| allocation.base <= *address);
            let allocation = Allocation {
                name: name.clone(),
                base: *address,
                data: data.clone(),
                written: vec![1; data.len()],
                shadow: Shadow::default(),
                constant: *constant,
            };
            self.allocations.insert(at, allocation);
        }
        self.last_hit = 0;
        Ok(())
    }

    /// The string that ends with a zero byte at an address, as far as it can be read.
    pub(crate) fn text(&self, address: u64) -> String {
        const MOST: u64 = 4096;
        let bytes = (0..MOST).map_while(|i| match self.lookup(address.wrapping_add(i), 1) {
            Ok((index, offset)) => Some(self.allocations[index].data[offset]).filter(|byte| *byte != 0),
            Err(_) => None,
        });
        String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
    }

    /// Writes from the host.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let (index, offset) = self.find(address, bytes.len())?;
        let allocation = &mut self.allocations[index];
        allocation.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        allocation.written[offset..offset + bytes.len()].fill(1);
        Ok(())
    }

    /// Reads from the host.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`]; [`MemoryError::Uninitialised`] when nothing wrote one of the bytes.
    pub fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, MemoryError> {
        let (index, offset) = self.lookup(address, bytes)?;
        let allocation = &self.allocations[index];
        match allocation.written[offset..offset + bytes].iter().position(|&written| written == 0) {
            Some(at) => Err(MemoryError::Uninitialised {
                name: allocation.name.clone(),
                offset: offset + at,
                address: address + at as u64,
            }),
            None => Ok(allocation.data[offset..offset + bytes].to_vec()),
        }
    }

    /// Which of the bytes something has written.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn written(&self, address: u64, bytes: usize) -> Result<Vec<bool>, MemoryError> {
        let (index, offset) = self.lookup(address, bytes)?;
        Ok(self.allocations[index].written[offset..offset + bytes].iter().map(|&written| written != 0).collect())
    }

    /// Makes the bytes unwritten again.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn poison(&mut self, address: u64, bytes: usize) -> Result<(), MemoryError> {
        let (index, offset) = self.lookup(address, bytes)?;
        self.allocations[index].written[offset..offset + bytes].fill(0);
        Ok(())
    }

    /// Allocation and offset of an access, remembering the last one found.
    pub(crate) fn find(&mut self, address: u64, bytes: usize) -> Result<(usize, usize), MemoryError> {
        if let Some(last) = self.allocations.get(self.last_hit)
            && let Some(offset) = address.checked_sub(last.base)
            && offset.saturating_add(bytes as u64) <= last.data.len() as u64
        {
            return Ok((self.last_hit, offset as usize));
        }
        let found = self.lookup(address, bytes)?;
        self.last_hit = found.0;
        Ok(found)
    }

    fn lookup(&self, address: u64, bytes: usize) -> Result<(usize, usize), MemoryError> {
        let after = self.allocations.partition_point(|allocation| allocation.base <= address);
        let below = after.checked_sub(1).map(|index| (index, &self.allocations[index]));
        if let Some((index, allocation)) = below {
            let offset = address - allocation.base;
            if offset.saturating_add(bytes as u64) <= allocation.data.len() as u64 {
                return Ok((index, offset as usize));
            }
        }
        let near = below.map_or_else(String::new, |(_, allocation)| {
            format!(
                "; `{}` of {} bytes begins {} bytes before",
                allocation.name,
                allocation.data.len(),
                address - allocation.base
            )
        });
        Err(MemoryError::OutOfBounds { address, bytes, near })
    }

    /// Forgets who accessed what: a new launch comes after everything before it.
    pub(crate) fn clear_shadow(&mut self) {
        for allocation in &mut self.allocations {
            allocation.shadow.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_large_is_refused() {
        let mut memory = Memory::new();
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            let refused = memory.try_alloc("huge", bytes);
            assert_eq!(refused, Err(MemoryError::OutOfMemory { name: "huge".to_owned(), bytes }));
        }
        let address = memory.try_alloc("small", 5).expect("there are five bytes");
        memory.write(address, &[1; 5]).expect("in range");
        assert_eq!(memory.read(address, 5), Ok(vec![1; 5]));
    }
}
