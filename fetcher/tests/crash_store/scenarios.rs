//! What is done to a store, and what it says meanwhile is safe.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use lazarette_fetcher::Result;
use lazarette_fetcher::index::ChunkId;
use lazarette_fetcher::index::ingest::LayerSink;
use lazarette_fetcher::store::{LayerFile, Store};
use lazarette_fetcher::test_util::layers::{chunk_bytes, put_bytes, put_chunk};
use lazarette_fetcher::types::Digest;

use crate::check::check_layer;
use crate::layers::{
    CHUNKS, LARGE, LARGE_LEN, PAST, STREAMED, complete_details, index, index_of_whole_spans,
    index_without_details, one_member, past_bytes, streamed,
};

/// What the scenario was told is safe. A crash must not take it.
#[derive(Default, Clone, Debug)]
pub(crate) struct Acked {
    /// Chunks of layer "lazy" that a flush recorded.
    pub(crate) chunks: BTreeSet<ChunkId>,
    /// Chunks of layer "other large" that a flush recorded.
    pub(crate) copied: BTreeSet<ChunkId>,
    /// Chunks of the layer of one member that a flush recorded.
    pub(crate) member: BTreeSet<ChunkId>,
    /// Whether that layer must have spans.
    pub(crate) member_shaped: bool,
    /// Layers that must be complete.
    pub(crate) complete: BTreeSet<&'static str>,
    /// Whether the streamed layer must have another index than it was made with, or must not.
    pub(crate) shaped: Option<bool>,
    /// Layers that must be gone.
    pub(crate) removed: BTreeSet<&'static str>,
    /// Blobs that must be there.
    pub(crate) blobs: BTreeSet<Vec<u8>>,
}

/// Runs all of it, or up to the first error; notes what was acknowledged.
pub(crate) type Scenario = fn(&Arc<Store>, &mut Acked) -> Result<()>;

pub(crate) const SCENARIOS: [(&str, Scenario); 16] = [
    ("shape members", shape_members),
    ("shape", shape),
    ("shape and doubt", shape_and_doubt),
    ("take details and flush", take_details_and_flush),
    ("copy", copy),
    ("pin and trim", pin_and_trim),
    ("learn digests and flush", learn_and_flush),
    ("evict and fill again", evict_and_fill_again),
    ("fill and flush", fill_and_flush),
    ("ingest", ingest),
    ("ingest past the page cache", ingest_past_the_page_cache),
    ("publish and flush", publish_and_flush),
    ("ingest over a partial layer", ingest_over_a_partial_layer),
    ("aborted ingest", aborted_ingest),
    ("remove", remove),
    ("blobs", blobs),
];

pub(crate) fn fill_and_flush(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let file = store.create_layer(index("lazy"))?;
    fill(&file, acked)
}

pub(crate) fn learn_and_flush(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index_of_whole_spans("lazy");
    let file = store.create_layer_with(index, &[0; 32])?;
    fill(&file, acked)
}

/// A member comes, a start that read a piece of it is learnt, and only that comes back.
pub(crate) fn shape_members(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let layer = one_member();
    let file = store.create_layer_with(layer.index.clone(), &layer.details)?;
    let mut put = 0;
    assert!(file.put_member(layer.hot, &layer.blob, |_, is_new| put += u32::from(is_new))?);
    assert_eq!(put, CHUNKS);
    file.flush()?;
    acked.member.extend(0..CHUNKS);
    let shaped = file.shape(&[layer.hot])?;
    // An entry that could not be noted is no error.
    acked.member_shaped = shaped.is_some();
    drop(file);
    acked.member.clear();
    store.evict_layers(None)?;
    let file = store.open_layer(&layer.index.blob_digest)?;
    let file = file.unwrap_or_else(|| panic!("it was recorded"));
    let at = usize::try_from(file.index().chunks[layer.hot as usize].data_offset);
    put_bytes(&file, layer.hot, layer.payload[at.unwrap()..].to_vec())?;
    file.flush()?;
    acked.member.insert(layer.hot);
    Ok(())
}

/// Details come just before the chunks that they speak of.
pub(crate) fn take_details_and_flush(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let (partial, details) = index_without_details("lazy");
    let file = store.create_layer_without_details(&partial)?;
    for (batch, span) in [(&[2_u32, 0][..], 0), (&[4, 3], 1), (&[1], 0)] {
        file.put_details(span, details[span as usize].clone().into())?;
        for id in batch {
            put_chunk(&file, *id)?;
        }
        file.flush()?;
        acked.chunks.extend(batch);
    }
    Ok(())
}

pub(crate) fn fill(file: &LayerFile, acked: &mut Acked) -> Result<()> {
    complete_details(file)?;
    for batch in [&[3_u32, 0][..], &[4], &[1, 2]] {
        for id in batch {
            put_chunk(file, *id)?;
        }
        file.flush()?;
        acked.chunks.extend(batch);
    }
    Ok(())
}

pub(crate) fn ingest(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index("whole");
    let mut ingest = store.begin_ingest(&index.blob_digest)?;
    for id in 0..CHUNKS {
        ingest.write_at(u64::from(id) * 4096, &chunk_bytes(id))?;
    }
    ingest.commit(index, &[])?;
    acked.complete.insert("whole");
    Ok(())
}

/// What is in the device's queue is as little safe as what is in the page cache.
pub(crate) fn ingest_past_the_page_cache(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index(PAST);
    let mut ingest = store.begin_ingest(&index.blob_digest)?.past_page_cache()?;
    for (id, chunk) in (0..).zip(&index.chunks) {
        ingest.write_at(chunk.data_offset, &past_bytes(id))?;
    }
    ingest.commit(index, &[])?;
    acked.complete.insert(PAST);
    Ok(())
}

/// Published first, recorded later.
pub(crate) fn publish_and_flush(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index("lazy");
    let mut ingest = store.begin_ingest(&index.blob_digest)?;
    for id in 0..CHUNKS {
        ingest.write_at(u64::from(id) * 4096, &chunk_bytes(id))?;
    }
    let file = ingest.publish(index, &[])?;
    assert!(file.is_complete());
    assert_eq!(check_layer(&file).len(), CHUNKS as usize);
    file.flush()?;
    acked.complete.insert("lazy");
    Ok(())
}

pub(crate) fn ingest_over_a_partial_layer(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let index = index("lazy");
    let file = store.create_layer(index.clone())?;
    put_chunk(&file, 2)?;
    file.flush()?;
    acked.chunks.insert(2);
    let mut ingest = store.begin_ingest(&index.blob_digest)?;
    for id in 0..CHUNKS {
        ingest.write_at(u64::from(id) * 4096, &chunk_bytes(id))?;
    }
    put_chunk(&file, 1)?;
    let whole = ingest.commit(index, &[])?;
    acked.complete.insert("lazy");
    assert!(whole.is_complete());
    put_chunk(&file, 3)?;
    file.flush()
}

pub(crate) fn aborted_ingest(store: &Arc<Store>, _: &mut Acked) -> Result<()> {
    let index = index("aborted");
    let mut ingest = store.begin_ingest(&index.blob_digest)?;
    ingest.write_at(0, &chunk_bytes(0))?;
    drop(ingest);
    Ok(())
}

pub(crate) fn remove(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    ingest(store, acked)?;
    let digest = index("whole").blob_digest;
    let open = store.open_layer(&digest)?;
    acked.complete.clear();
    assert!(store.remove_layer(&digest)?);
    acked.removed.insert("whole");
    drop(open);
    Ok(())
}

pub(crate) fn blobs(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    for bytes in [&b"a manifest"[..], b"a config", &[7; 5000]] {
        store.put_blob(&Digest::sha256(bytes), bytes)?;
        acked.blobs.insert(bytes.to_vec());
    }
    acked.blobs.remove(&b"a config"[..]);
    assert!(store.remove_blob(&Digest::sha256(b"a config"))?);
    Ok(())
}

pub(crate) fn evict_and_fill_again(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let file = store.create_layer(index("lazy"))?;
    for id in 0..CHUNKS {
        put_chunk(&file, id)?;
    }
    file.flush()?;
    acked.chunks.extend([0, 2, 4]);
    file.evict(&[1, 3])?;
    put_chunk(&file, 3)?;
    file.flush()?;
    acked.chunks = [3].into();
    file.evict(&[0, 2, 4])?;
    acked.chunks.clear();
    file.evict_all()?;
    put_chunk(&file, 0)?;
    file.flush()?;
    acked.chunks.insert(0);
    Ok(())
}

/// One layer takes what another has, which is then evicted and removed.
pub(crate) fn copy(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let [large, other] = LARGE.map(index);
    let from = store.create_layer(large)?;
    for id in 0..3 {
        put_bytes(
            &from,
            id,
            vec![u8::try_from(id + 1).unwrap(); LARGE_LEN as usize],
        )?;
    }
    let to = store.create_layer(other)?;
    for ids in [[0], [2]] {
        to.copy_local(&ids, |_, _| {});
        let present = (0..3).filter(|id| to.is_present(*id)).collect();
        to.flush()?;
        acked.copied = present;
    }
    from.evict_all()?;
    acked.copied.remove(&0);
    to.evict(&[0])?;
    store.remove_layer(from.digest())?;
    // Nobody has it any more: it stays absent.
    to.copy_local(&[0, 1], |_, _| {});
    to.flush()
}

/// Hints beside a layer's data, which everything leaves as they are or drops.
pub(crate) fn pin_and_trim(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    fill_and_flush(store, acked)?;
    let file = store.create_layer(index("lazy"))?;
    let mut buf = vec![0; 100];
    file.read_at(0, &mut buf)?;
    file.pin([0, 1], SystemTime::now());
    file.flush()?;
    acked.chunks.clear();
    store.trim(0)?;
    put_chunk(&file, 1)?;
    file.flush()?;
    acked.chunks.insert(1);
    Ok(())
}

/// A layer gets an index that was made for its starts.
pub(crate) fn shape(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    let streamed = streamed();
    let mut ingest = store.begin_ingest(&streamed.index.blob_digest)?;
    ingest.write_at(0, &streamed.payload)?;
    let ingest = ingest.with_seams(streamed.seams.clone());
    let file = ingest.commit(streamed.index.clone(), &streamed.details)?;
    acked.complete.insert(STREAMED);
    let shaped = file.shape(&[streamed.hot])?.expect("it is worth it");
    assert!(shaped.after_bytes < shaped.before_bytes);
    acked.shaped = Some(true);
    Ok(())
}

/// It turns out to be wrong.
pub(crate) fn shape_and_doubt(store: &Arc<Store>, acked: &mut Acked) -> Result<()> {
    shape(store, acked)?;
    let file = store.open_layer(&streamed().index.blob_digest)?;
    let file = file.expect("it was made");
    assert_ne!(file.index().spans, streamed().index.spans);
    acked.shaped = None;
    file.doubt(streamed().hot)?;
    acked.shaped = Some(false);
    Ok(())
}
