//! Who the container's process runs as, from the texts of `/etc/passwd` and `/etc/group`.
//!
//! Pure: the texts come from the image and are not trusted. Lines that do not parse are
//! skipped, as every libc does; an unknown name is an error, an unknown number is not.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::SpecError;

/// Supplementary groups kept at most; the kernel's own limit (`NGROUPS_MAX`).
const GROUPS_MAX: usize = 65_536;

/// A resolved user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvedUser {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, the primary one first, no duplicates.
    pub additional_gids: Vec<u32>,
    /// Home directory from passwd; `/` for a number that passwd does not know.
    pub home: PathBuf,
}

/// Texts of an image's account files, empty where it has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountFiles {
    /// Of `/etc/passwd`.
    pub passwd: String,
    /// Of `/etc/group`.
    pub group: String,
}

struct PasswdLine<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct GroupLine<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn passwd_lines(text: &str) -> impl Iterator<Item = PasswdLine<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(PasswdLine {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn group_lines(text: &str) -> impl Iterator<Item = GroupLine<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(GroupLine {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    })
}

/// Resolves `request` (`""`, `name`, `uid`, `name:group`, `uid:gid`, ...); empty means root.
///
/// With an explicit group the supplementary groups of the group file do not apply.
///
/// # Errors
/// [`SpecError::UnknownUser`] or [`SpecError::UnknownGroup`] for a name the image lacks.
pub fn resolve(request: &str, accounts: &AccountFiles) -> Result<ResolvedUser, SpecError> {
    let (user, group) = match request.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (request, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let line =
        passwd_lines(&accounts.passwd).find(|line| line.name == user || Some(line.uid) == number);
    let (uid, primary, home, name) = match (&line, number) {
        (Some(line), _) => (line.uid, line.gid, line.home, Some(line.name)),
        (None, Some(uid)) => (uid, 0, "", None),
        (None, None) => {
            return Err(SpecError::UnknownUser {
                user: user.to_owned(),
            });
        }
    };
    let gid = group.map_or(Ok(primary), |group| group_id(group, &accounts.group))?;
    let mut additional_gids = vec![gid];
    if let (None, Some(name)) = (group, name) {
        let of_user = group_lines(&accounts.group)
            .filter(|line| line.members.split(',').any(|member| member.trim() == name));
        for line in of_user {
            if additional_gids.len() < GROUPS_MAX && !additional_gids.contains(&line.gid) {
                additional_gids.push(line.gid);
            }
        }
    }
    let home = PathBuf::from(if home.is_empty() { "/" } else { home });
    Ok(ResolvedUser {
        uid,
        gid,
        additional_gids,
        home,
    })
}

fn group_id(group: &str, text: &str) -> Result<u32, SpecError> {
    let number = group.parse::<u32>().ok();
    let known = group_lines(text)
        .find(|line| line.name == group || Some(line.gid) == number)
        .map(|line| line.gid);
    known.or(number).ok_or_else(|| SpecError::UnknownGroup {
        group: group.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment:x:9:9::/:\nbroken\n\
        www:x:33:33:www:/var/www:/bin/false\n1000:x:77:78::/odd:/bin/sh\nbad:x:many:1::/:\n\
        nohome:x:50:51\n";
    const GROUP: &str = "root:x:0:\nwww:x:33:\nvideo:x:44:www,other\naudio:x:29: www \n\
        dup:x:44:www\nbroken:x\n";

    fn accounts() -> AccountFiles {
        AccountFiles {
            passwd: PASSWD.to_owned(),
            group: GROUP.to_owned(),
        }
    }

    #[test]
    fn users_and_groups_resolve() {
        let cases: &[(&str, u32, u32, &[u32], &str)] = &[
            ("", 0, 0, &[0], "/root"),
            ("root", 0, 0, &[0], "/root"),
            ("www", 33, 33, &[33, 44, 29], "/var/www"),
            ("33", 33, 33, &[33, 44, 29], "/var/www"),
            ("www:video", 33, 44, &[44], "/var/www"),
            ("www:", 33, 33, &[33, 44, 29], "/var/www"),
            (":44", 0, 44, &[44], "/root"),
            ("12345", 12345, 0, &[0], "/"),
            ("12345:54321", 12345, 54321, &[54321], "/"),
            ("1000", 77, 78, &[78], "/odd"),
            ("nohome", 50, 51, &[51], "/"),
        ];
        for (request, uid, gid, groups, home) in cases {
            let user = resolve(request, &accounts()).unwrap();
            assert_eq!((user.uid, user.gid), (*uid, *gid), "{request}");
            assert_eq!(user.additional_gids, *groups, "{request}");
            assert_eq!(user.home, PathBuf::from(home), "{request}");
        }
    }

    #[test]
    fn unknown_names_are_errors() {
        for request in ["nobody", "comment", "broken", "bad", "-1", "99999999999"] {
            let error = resolve(request, &accounts()).unwrap_err();
            assert!(error.to_string().contains(request), "{error}");
        }
        let error = resolve("www:nogroup", &accounts()).unwrap_err();
        assert!(matches!(error, SpecError::UnknownGroup { .. }), "{error}");
        assert!(resolve("", &AccountFiles::default()).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn any_text_gives_an_answer(request: String, passwd: String, group: String) {
            let _ = resolve(&request, &AccountFiles { passwd, group });
        }
    }
}
