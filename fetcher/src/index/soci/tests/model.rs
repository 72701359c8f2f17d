//! A zTOC that can say anything, and how it is written.
//!
//! Invariant: what is written is a right FlatBuffer, whatever its values are; fields are
//! where a writer of the schema may put them, but never where the Go writer does.

/// See the schema in `soci/`.
#[derive(Clone)]
pub(super) struct Model {
    pub(super) blob_size: i64,
    pub(super) tar_len: i64,
    pub(super) algorithm: Option<i8>,
    pub(super) span_id_max: i32,
    pub(super) digests: Vec<String>,
    pub(super) checkpoints: Vec<u8>,
    pub(super) files: Vec<File>,
}

/// A file of a zTOC.
#[derive(Clone)]
pub(super) struct File {
    pub(super) name: String,
    pub(super) kind: String,
    pub(super) offset: i64,
    pub(super) size: i64,
    pub(super) link: String,
    pub(super) mode: i64,
    pub(super) mtime: String,
    pub(super) major: i64,
    pub(super) minor: i64,
    pub(super) records: Vec<(String, Vec<u8>)>,
}

impl File {
    pub(super) fn new(name: &str, kind: &str, offset: i64, size: i64) -> Self {
        Self {
            name: name.to_owned(),
            kind: kind.to_owned(),
            offset,
            size,
            link: String::new(),
            mode: 0o755,
            mtime: "2023-11-14T22:13:20.000000005Z".to_owned(),
            major: 0,
            minor: 0,
            records: Vec::new(),
        }
    }

    fn value(&self, records: Value) -> Value {
        let text = |text: &str| Some(Value::Bytes(text.as_bytes().to_vec()));
        Value::Table(vec![
            text(&self.name),
            text(&self.kind),
            Some(Value::Scalar(self.offset.to_le_bytes().to_vec())),
            Some(Value::Scalar(self.size.to_le_bytes().to_vec())),
            text(&self.link),
            Some(Value::Scalar(self.mode.to_le_bytes().to_vec())),
            Some(Value::Scalar(7_u32.to_le_bytes().to_vec())),
            Some(Value::Scalar(70_000_u32.to_le_bytes().to_vec())),
            text("user"),
            None,
            text(&self.mtime),
            Some(Value::Scalar(self.major.to_le_bytes().to_vec())),
            Some(Value::Scalar(self.minor.to_le_bytes().to_vec())),
            Some(records),
        ])
    }
}

impl Model {
    /// The bytes of the zTOC.
    pub(super) fn encode(&self) -> Vec<u8> {
        let file = |file: &File| file.value(records(&file.records));
        let files = self.files.iter().map(file).collect();
        encode(&self.value(files), &records(&[]))
    }

    /// The bytes of a zTOC whose files all have one vector of records, these.
    pub(super) fn encode_sharing(&self, shared: &[(String, Vec<u8>)]) -> Vec<u8> {
        let file = |file: &File| file.value(Value::Shared);
        let files = self.files.iter().map(file).collect();
        encode(&self.value(files), &records(shared))
    }

    /// Says other places of a checkpoint.
    pub(super) fn place(&mut self, number: usize, blob: u64, tar: u64) {
        let at = 12 + number * (17 + (32 << 10));
        self.checkpoints[at..at + 8].copy_from_slice(&blob.to_le_bytes());
        self.checkpoints[at + 8..at + 16].copy_from_slice(&tar.to_le_bytes());
    }

    fn value(&self, files: Vec<Value>) -> Value {
        let digests = self.digests.iter();
        let digests = digests.map(|text| Value::Bytes(text.as_bytes().to_vec()));
        let algorithm = self.algorithm;
        let compression = Value::Table(vec![
            algorithm.map(|kind| Value::Scalar(kind.to_le_bytes().to_vec())),
            Some(Value::Scalar(self.span_id_max.to_le_bytes().to_vec())),
            Some(Value::Refs(digests.collect())),
            Some(Value::Bytes(self.checkpoints.clone())),
        ]);
        Value::Table(vec![
            Some(Value::Bytes(b"0.9".to_vec())),
            None,
            Some(Value::Scalar(self.blob_size.to_le_bytes().to_vec())),
            Some(Value::Scalar(self.tar_len.to_le_bytes().to_vec())),
            Some(Value::Table(vec![Some(Value::Refs(files))])),
            Some(compression),
        ])
    }
}

fn records(records: &[(String, Vec<u8>)]) -> Value {
    let record = |(key, value): &(String, Vec<u8>)| {
        Value::Table(vec![
            Some(Value::Bytes(key.as_bytes().to_vec())),
            Some(Value::Bytes(value.clone())),
        ])
    };
    Value::Refs(records.iter().map(record).collect())
}

/// A checkpoint with a window of one byte again and again.
pub(super) fn checkpoint(blob: u64, tar: u64, bits: u8, window: u8) -> Vec<u8> {
    let mut bytes = [blob.to_le_bytes(), tar.to_le_bytes()].concat();
    bytes.push(bits);
    bytes.resize(17 + (32 << 10), window);
    bytes
}

/// Checkpoints of gzip that say that they are `count`.
pub(super) fn checkpoints(count: i32, places: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = count.to_le_bytes().to_vec();
    bytes.extend(4_194_304_i64.to_le_bytes());
    bytes.extend(places.concat());
    bytes
}

/// What stands for the checkpoints of a tar.
pub(super) fn tar_zinfo(span_size: i64, size: i64) -> Vec<u8> {
    let table = Value::Table(vec![
        Some(Value::Scalar(2_i32.to_le_bytes().to_vec())),
        Some(Value::Scalar(span_size.to_le_bytes().to_vec())),
        Some(Value::Scalar(size.to_le_bytes().to_vec())),
    ]);
    encode(&table, &records(&[]))
}

/// A part of a FlatBuffer.
enum Value {
    Scalar(Vec<u8>),
    Bytes(Vec<u8>),
    Refs(Vec<Value>),
    Table(Vec<Option<Value>>),
    /// What is written once, at the end.
    Shared,
}

fn encode(root: &Value, shared: &Value) -> Vec<u8> {
    let mut writer = Writer {
        out: vec![0; 4],
        sharing: Vec::new(),
    };
    writer.refer(0, root);
    let at = writer.value(shared);
    for from in std::mem::take(&mut writer.sharing) {
        writer.point(from, at);
    }
    writer.out
}

struct Writer {
    out: Vec<u8>,
    /// Where distances to what is shared belong.
    sharing: Vec<usize>,
}

impl Writer {
    /// Writes `value` at the end and the distance to it at `from`.
    fn refer(&mut self, from: usize, value: &Value) {
        if let Value::Shared = value {
            self.sharing.push(from);
            return;
        }
        let at = self.value(value);
        self.point(from, at);
    }

    fn point(&mut self, from: usize, at: usize) {
        let distance = u32::try_from(at - from).expect("it is small");
        self.out[from..from + 4].copy_from_slice(&distance.to_le_bytes());
    }

    fn value(&mut self, value: &Value) -> usize {
        match value {
            Value::Scalar(_) | Value::Shared => unreachable!("they stand in tables"),
            Value::Bytes(bytes) => {
                let at = self.len(bytes.len());
                self.out.extend_from_slice(bytes);
                at
            }
            Value::Refs(values) => {
                let at = self.len(values.len());
                self.out.resize(at + 4 + 4 * values.len(), 0);
                for (number, value) in values.iter().enumerate() {
                    self.refer(at + 4 + 4 * number, value);
                }
                at
            }
            Value::Table(fields) => self.table(fields),
        }
    }

    fn len(&mut self, len: usize) -> usize {
        let at = self.out.len();
        let len = u32::try_from(len).expect("it is small");
        self.out.extend(len.to_le_bytes());
        at
    }

    /// Eight bytes for each field, in order, behind the vtable.
    fn table(&mut self, fields: &[Option<Value>]) -> usize {
        let vtable = self.out.len();
        let short = |n: usize| u16::try_from(n).expect("it is small").to_le_bytes();
        self.out.extend(short(4 + 2 * fields.len()));
        self.out.extend(short(4 + 8 * fields.len()));
        for (number, field) in fields.iter().enumerate() {
            let place = field.as_ref().map_or(0, |_| 4 + 8 * number);
            self.out.extend(short(place));
        }
        let at = self.out.len();
        let back = i32::try_from(at - vtable).expect("it is small");
        self.out.extend(back.to_le_bytes());
        self.out.resize(at + 4 + 8 * fields.len(), 0);
        for (number, field) in fields.iter().enumerate() {
            let place = at + 4 + 8 * number;
            match field {
                Some(Value::Scalar(bytes)) => {
                    self.out[place..place + bytes.len()].copy_from_slice(bytes);
                }
                Some(value) => self.refer(place, value),
                None => {}
            }
        }
        at
    }
}
