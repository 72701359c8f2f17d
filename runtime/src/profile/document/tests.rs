//! Documents from anywhere: what is read, and what is refused.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn sample() -> Value {
    json!({
        "mediaType": MEDIA_TYPE,
        "manifest": Digest::sha256(b"manifest").to_string(),
        "layers": [Digest::sha256(b"base").to_string(), Digest::sha256(b"top").to_string()],
        "commands": [{
            "command": Digest::sha256(b"run\0").to_string(), "program": "run", "runs": 2,
            "updatedAt": 1_760_000_000, "blocks": [[1, 7, 65535, 2, 1], [0, 4_294_967_295_u32, 1, 1, 2]],
        }],
    })
}

fn parse(value: &Value) -> Result<ImageProfiles> {
    ImageProfiles::parse("profile", &serde_json::to_vec(value).unwrap())
}

#[test]
fn a_document_is_what_it_was() {
    let read = parse(&sample()).unwrap();
    assert_eq!(read.commands[0].blocks[0].place.block, 7);
    assert_eq!(serde_json::to_value(&read).unwrap(), sample());
}

#[test]
fn hostile_documents_are_refused() {
    type Edit = fn(&mut Value);
    let table: [(&str, Edit); 18] = [
        ("media type", |v| v["mediaType"] = json!("application/json")),
        ("layer 2", |v| v["commands"][0]["blocks"][0][0] = json!(2)),
        ("without pages", |v| {
            v["commands"][0]["blocks"][0][2] = json!(0)
        }),
        ("twice", |v| {
            v["commands"][0]["blocks"][1] = json!([1, 7, 1, 1, 1]);
        }),
        ("command twice", |v| {
            let command = v["commands"][0].clone();
            v["commands"] = json!([command, command]);
        }),
        ("commands, at most", |v| {
            v["commands"] = json!(vec![v["commands"][0].clone(); 9])
        }),
        ("layers, at most", |v| {
            v["layers"] = json!(vec![v["layers"][0].clone(); 500])
        }),
        ("blocks, at most", |v| {
            v["commands"][0]["blocks"] = json!(vec![[0, 0, 1, 1, 1]; BLOCKS_MAX + 1]);
        }),
        ("program", |v| {
            v["commands"][0]["program"] = json!("\u{1b}[2J")
        }),
        ("program", |v| {
            v["commands"][0]["program"] = json!("x".repeat(257))
        }),
        ("malformed", |v| {
            v["commands"][0]["blocks"][0][1] = json!(-1)
        }),
        ("malformed", |v| v["manifest"] = json!("sha256:short")),
        ("starts", |v| {
            v["commands"][0]["blocks"][0][3] = json!(0);
        }),
        ("starts", |v| {
            v["commands"][0]["blocks"][0][3] = json!(u32::MAX);
        }),
        ("starts", |v| {
            v["commands"][0]["blocks"][1][3] = json!(2);
        }),
        ("starts", |v| {
            v["commands"][0]["blocks"][0][4] = json!(0);
        }),
        ("starts", |v| {
            v["commands"][0]["blocks"][1][4] = json!(3);
        }),
        ("starts", |v| v["commands"][0]["runs"] = json!(u32::MAX)),
    ];
    for (word, edit) in table {
        let mut value = sample();
        edit(&mut value);
        let error = parse(&value).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    let huge = vec![b' '; usize::try_from(DOCUMENT_BYTES_MAX).unwrap() + 1];
    let error = ImageProfiles::parse("profile", &huge).unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error}");
    let deep = "[".repeat(100_000);
    assert!(ImageProfiles::parse("profile", deep.as_bytes()).is_err());
}

#[test]
fn the_largest_document_fits_its_limit() {
    let block = Block::from((498, 1 << 20, u16::MAX, 1000, 1000));
    let bytes = serde_json::to_vec(&block).unwrap().len() + 1;
    let all = (bytes * BLOCKS_MAX * COMMANDS_MAX) as u64;
    assert!(all <= DOCUMENT_BYTES_MAX, "{all}");
}

#[test]
fn commands_are_told_apart_by_every_word() {
    let command = |words: &[&str]| {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        Command::new(&words)
    };
    let one = command(&["sh", "-c", "a b"]);
    assert_eq!(one.program, "sh");
    assert_ne!(one.digest, command(&["sh", "-c", "a", "b"]).digest);
    assert_ne!(one.digest, command(&["sh", "-ca b"]).digest);
    assert_eq!(one.digest, command(&["sh", "-c", "a b"]).digest);
    let long = "é".repeat(400);
    assert_eq!(command(&[&long]).program.len(), 256);
    assert_eq!(command(&["a\nb"]).program, "ab");
}

#[test]
fn an_unknown_command_starts_as_the_last_of_its_program() {
    let profile = |words: &[&str], updated_at| {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let command = Command::new(&words);
        let empty = CommandProfile::empty(&command);
        (
            command,
            CommandProfile {
                updated_at,
                ..empty
            },
        )
    };
    let mut profiles = ImageProfiles::empty(Digest::sha256(b"m"), Vec::new());
    let (known, old) = profile(&["python3", "a.py"], 5);
    let (_, new) = profile(&["python3", "b.py"], 6);
    for profile in [old.clone(), new.clone(), profile(&["sh"], 9).1] {
        profiles.put(profile);
    }
    assert_eq!(profiles.choose(&known), Some((&old, false)));
    assert_eq!(
        profiles.choose(&profile(&["python3"], 0).0),
        Some((&new, true))
    );
    assert_eq!(profiles.choose(&profile(&["perl"], 0).0), None);
    // There is room for so many; the one started longest ago goes.
    for n in 0..COMMANDS_MAX as u64 - 2 {
        profiles.put(profile(&["more", &n.to_string()], 10 + n).1);
    }
    assert_eq!(profiles.commands.len(), COMMANDS_MAX);
    assert!(profiles.of(&known).is_none());
    profiles.check("profiles").unwrap();
}

proptest! {
    #[test]
    fn any_bytes_are_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300), at in any::<prop::sample::Index>()) {
        let _ = ImageProfiles::parse("profile", &bytes);
        let mut near = serde_json::to_vec(&sample()).unwrap();
        let at = at.index(near.len());
        near[at] = bytes.first().copied().unwrap_or_default();
        let _ = ImageProfiles::parse("profile", &near);
    }
}
