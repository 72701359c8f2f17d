//! What is noted of reads, against a plain model.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Everything is there, or nothing and fills wait.
struct Data {
    is_there: bool,
}

impl LayerData for Data {
    fn try_read(&self, _: u64, buf: &mut [u8]) -> lazarette_fetcher::Result<bool> {
        buf.fill(7);
        Ok(self.is_there)
    }

    fn fill(&self, _: ByteRange) -> Filling<'_> {
        Box::pin(std::future::pending())
    }

    fn keep(&self) -> lazarette_fetcher::Result<Kept> {
        Ok(Kept::default())
    }
}

fn tap(recorder: &Arc<Recorder>, number: u32, data_len: u64) -> Arc<dyn LayerData> {
    recorder.tap_data(number, Arc::new(Data { is_there: true }), data_len)
}

fn seen(recorder: &Recorder) -> Vec<(u32, u32, u16)> {
    let touches = recorder.touches().into_iter();
    touches
        .map(|touch| (touch.layer, touch.place.block, touch.place.pages))
        .collect()
}

#[test]
fn first_reads_are_noted_in_order() {
    let recorder = Recorder::new();
    let (base, top) = (tap(&recorder, 0, 1 << 20), tap(&recorder, 4, 100_000));
    assert!(!recorder.has_any());
    let read = |tap: &Arc<dyn LayerData>, offset, len| {
        let mut buf = vec![0; len];
        assert!(tap.try_read(offset, &mut buf).unwrap());
        assert!(buf.iter().all(|byte| *byte == 7), "as the layer said");
    };
    read(&top, 4096, 1);
    read(&base, 65_535, 2);
    read(&top, 0, 4096);
    read(&base, 0, 0);
    assert!(recorder.has_any());
    assert_eq!(seen(&recorder), [(4, 0, 0b11), (0, 0, 0x8000), (0, 1, 1)]);
    // What is behind the data file's end is nobody's.
    read(&top, 100_000, 4096);
    read(&top, u64::MAX - 10, 10);
    recorder.close();
    read(&base, 1 << 19, 4096);
    assert_eq!(seen(&recorder)[3..], [(4, 1, 0b11_0000_0000)]);
}

#[tokio::test]
async fn readers_that_wait_are_counted() {
    let recorder = Recorder::new();
    let tap = recorder.tap_data(0, Arc::new(Data { is_there: false }), 9000);
    assert!(!recorder.is_waiting());
    let mut filling = tap.fill(ByteRange::at(0, 10).unwrap());
    assert!(futures_util::poll!(&mut filling).is_pending());
    assert!(recorder.is_waiting());
    drop(filling);
    assert!(!recorder.is_waiting());
}

proptest! {
    #[test]
    fn pages_are_those_that_were_read(
        reads in prop::collection::vec((0_u64..300_000, 1_usize..150_000), 0..30),
    ) {
        let recorder = Recorder::new();
        let data_len = 300_000;
        let tap = tap(&recorder, 0, data_len);
        let mut pages: BTreeMap<u64, u64> = BTreeMap::new();
        let mut order = Vec::new();
        for (offset, len) in reads {
            let len = len.min(usize::try_from(data_len - offset).unwrap());
            tap.try_read(offset, &mut vec![0; len]).unwrap();
            for page in offset / PAGE_BYTES..=(offset + len as u64 - 1) / PAGE_BYTES {
                let mask = pages.entry(page / 16).or_insert_with(|| {
                    order.push(page / 16);
                    0
                });
                *mask |= 1 << (page % 16);
            }
        }
        let expected: Vec<(u64, u64)> = order.iter().map(|block| (*block, pages[block])).collect();
        let got: Vec<(u64, u64)> = seen(&recorder)
            .iter()
            .map(|(_, block, pages)| (u64::from(*block), u64::from(*pages)))
            .collect();
        prop_assert_eq!(got, expected);
    }
}
