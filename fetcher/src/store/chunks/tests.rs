//! The table as a file: shared, full, damaged, made by two at once.

use super::*;

fn digest(number: u32) -> [u8; 32] {
    let digest = Digest::sha256(&number.to_le_bytes());
    digest.as_bytes().try_into().unwrap()
}

fn place(data_offset: u64) -> Place {
    Place {
        layer: 9,
        data_offset,
    }
}

#[test]
fn what_one_handle_notes_another_finds() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (ChunkTable::open(dir.path()), ChunkTable::open(dir.path()));
    assert_eq!(b.find(&digest(1)), []);
    a.note(&digest(1), place(4096));
    assert_eq!(b.find(&digest(1)), [place(4096)]);
    b.forget(&digest(1), place(4096));
    assert_eq!(a.find(&digest(1)), []);
    drop((a, b));
    let chunks = (0..10_000).map(|n| (digest(n), place(u64::from(n))));
    ChunkTable::open(dir.path()).note_all(chunks);
    let table = ChunkTable::open(dir.path());
    let found = |n: &u32| table.find(&digest(*n)) == [place(u64::from(*n))];
    assert_eq!((0..10_000).filter(found).count(), 10_000);
}

#[test]
fn a_full_table_keeps_what_came_last() {
    let dir = tempfile::tempdir().unwrap();
    let file = File::create(dir.path().join(NAME)).unwrap();
    make(&file, 64).unwrap();
    let table = ChunkTable::open(dir.path());
    assert_eq!(table.buckets, 64, "the file says how large it is");
    for n in 0..5000 {
        table.note(&digest(n), place(u64::from(n)));
    }
    let found = |range: Range<u32>| {
        range
            .filter(|n| !table.find(&digest(*n)).is_empty())
            .count()
    };
    assert!(found(4900..5000) > 95, "{}", found(4900..5000));
    assert!(found(0..4000) < 10, "{}", found(0..4000));
}

#[test]
fn what_is_no_table_is_made_one() {
    let whole = {
        let dir = tempfile::tempdir().unwrap();
        ChunkTable::open(dir.path());
        std::fs::read(dir.path().join(NAME)).unwrap()
    };
    let spoiled = |at: usize, byte: u8| {
        let mut bytes = whole[..64].to_vec();
        bytes[at] = byte;
        bytes
    };
    let table = [
        Vec::new(),
        b"short".to_vec(),
        whole[..whole.len() - 1].to_vec(),
        spoiled(0, 0),
        spoiled(8, 9),
        spoiled(15, 255),
    ];
    for bytes in table {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(NAME), &bytes).unwrap();
        let chunks = ChunkTable::open(dir.path());
        chunks.note(&digest(1), place(1));
        assert_eq!(ChunkTable::open(dir.path()).find(&digest(1)), [place(1)]);
    }
}

#[test]
fn without_a_file_nothing_is_known_and_nothing_fails() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(NAME)).unwrap();
    let table = ChunkTable::open(dir.path());
    table.note(&digest(1), place(1));
    table.note_all([(digest(2), place(2))].into_iter());
    table.forget(&digest(1), place(1));
    assert_eq!(table.find(&digest(1)), []);
}

#[test]
fn layers_are_found_by_the_first_bytes_of_their_digest() {
    let dir = tempfile::tempdir().unwrap();
    let table = ChunkTable::open(dir.path());
    let layer = Digest::sha256(b"a layer");
    assert_eq!(table.layer_dir(short(&layer)).unwrap(), None);
    let path = dir.path().join("layers").join(layer.file_name());
    std::fs::create_dir_all(&path).unwrap();
    assert_eq!(table.layer_dir(short(&layer)).unwrap(), Some(path));
}
