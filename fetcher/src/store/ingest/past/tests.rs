//! The same bytes whichever way they go, and errors that come back.

use parking_lot::{Condvar, Mutex};
use proptest::prelude::*;

use super::*;

const ROOM: usize = 2 * BLOCK_LEN;

/// How a device answers writes past the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Device {
    Good,
    /// It has no such writes.
    Refuses,
    /// It takes none of them until something came through the page cache.
    Waits,
    Breaks,
}

/// A file in memory, and how often each way was gone.
struct Memory {
    device: Device,
    file: Mutex<File>,
    came_through: Condvar,
}

#[derive(Default)]
struct File {
    bytes: Vec<u8>,
    past: usize,
    through: usize,
}

impl File {
    fn put(&mut self, start: u64, bytes: &[u8]) {
        let start = usize::try_from(start).unwrap();
        let len = self.bytes.len().max(start + bytes.len());
        self.bytes.resize(len, 0);
        self.bytes
            .get_mut(start..start + bytes.len())
            .unwrap()
            .copy_from_slice(bytes);
    }
}

impl Ways for Arc<Memory> {
    fn past(&self, start: u64, blocks: &[u8]) -> Result<bool> {
        for number in [
            usize::try_from(start).unwrap(),
            blocks.len(),
            blocks.as_ptr().addr(),
        ] {
            assert_eq!(number % BLOCK_LEN, 0, "the kernel refuses it");
        }
        let mut file = self.file.lock();
        match self.device {
            Device::Good => {}
            Device::Refuses => return Ok(false),
            Device::Waits => {
                while file.through == 0 {
                    self.came_through.wait(&mut file);
                }
            }
            Device::Breaks => {
                let error = io::Error::other("it broke");
                return Err(Error::io("write to", "a device", error));
            }
        }
        file.put(start, blocks);
        file.past += 1;
        Ok(true)
    }

    fn through(&self, start: u64, bytes: &[u8]) -> Result<()> {
        let mut file = self.file.lock();
        file.put(start, bytes);
        file.through += 1;
        self.came_through.notify_all();
        Ok(())
    }
}

fn memory(device: Device) -> Arc<Memory> {
    Arc::new(Memory {
        device,
        file: Mutex::default(),
        came_through: Condvar::new(),
    })
}

/// Writes of so many bytes, each so far behind the end of the one before; what the file has
/// to be.
fn write(past: &mut Past<Arc<Memory>>, writes: &[(usize, usize)]) -> Result<Vec<u8>> {
    let mut right = Vec::new();
    for (gap, len) in writes {
        let at = right.len() + gap;
        right.resize(at, 0);
        let bytes: Vec<u8> = (0..*len).map(|i| (i % 250 + 1).to_le_bytes()[0]).collect();
        past.write_at(at as u64, &bytes)?;
        right.extend(bytes);
    }
    Ok(right)
}

proptest! {
    #[test]
    fn every_way_leads_to_the_same_file(
        writes in prop::collection::vec(
            (prop_oneof![Just(0_usize), 0_usize..5000, 0..4 * ROOM], 1_usize..3 * ROOM),
            0..20,
        ),
    ) {
        for device in [Device::Good, Device::Refuses] {
            let memory = memory(device);
            let mut past = Past::new(Arc::clone(&memory), ROOM);
            let right = write(&mut past, &writes).unwrap();
            past.finish().unwrap();
            let mut file = memory.file.lock();
            // The last block's rest.
            let len = file.bytes.len().min(right.len());
            let rest = file.bytes.split_off(len);
            prop_assert!(rest.len() < BLOCK_LEN && rest.iter().all(|byte| *byte == 0));
            prop_assert!(file.bytes == right, "{device:?}");
        }
    }
}

#[test]
fn what_a_slow_device_does_not_take_goes_through_the_page_cache() {
    let memory = memory(Device::Waits);
    let mut past = Past::new(Arc::clone(&memory), ROOM);
    let right = write(&mut past, &[(0, 20 * ROOM)]).unwrap();
    past.finish().unwrap();
    let file = memory.file.lock();
    assert!(file.bytes == right);
    assert!(file.past > 0 && file.through > 0);
}

#[test]
fn little_needs_no_thread() {
    let memory = memory(Device::Breaks);
    let mut past = Past::new(Arc::clone(&memory), ROOM);
    let right = write(&mut past, &[(0, 100), (3996, ROOM - BLOCK_LEN - 1)]).unwrap();
    past.finish().unwrap();
    assert!(memory.file.lock().bytes == right);
}

#[test]
fn an_error_comes_back_and_nothing_is_left_behind() {
    let memory = memory(Device::Breaks);
    let mut past = Past::new(Arc::clone(&memory), ROOM);
    let written = write(&mut past, &[(0, 50 * ROOM)]);
    let error = written.and_then(|_| past.finish()).unwrap_err();
    assert!(error.to_string().contains("it broke"), "{error}");
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn what_is_given_up_is_gone_at_once() {
    let memory = memory(Device::Good);
    let mut past = Past::new(Arc::clone(&memory), ROOM);
    write(&mut past, &[(0, 9 * ROOM)]).unwrap();
    assert!(Arc::strong_count(&memory) > 1);
    drop(past);
    assert_eq!(Arc::strong_count(&memory), 1);
}
