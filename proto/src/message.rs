//! How a message is declared, and how it travels.
//!
//! Invariant: a field that holds its type's default is not sent, one that is not known is
//! skipped, as proto3 has it. Lengths and depths of what comes in are bounded by prost and
//! by [`crate::MESSAGE_BYTES_MAX`].

use std::fmt;
use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{DecodeBuf, Decoder, EncodeBuf, Encoder};

/// A message whose fields can be compared with a definition file.
pub trait Declared {
    /// Its name in the definition file.
    const NAME: &'static str;
    /// Name, number and type of each field, in the words of the definition file.
    const FIELDS: &'static [(&'static str, u32, &'static str)];
}

/// A text that is never printed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "" } else { ".." })
    }
}

/// Declares messages: `name: kind = number`, where `kind` is a module of [`kind`].
macro_rules! messages {
    ($(
        $(#[$doc:meta])*
        pub struct $name:ident {
            $( $(#[$field_doc:meta])* $field:ident: $kind:ident $(<$inner:ty>)? = $tag:literal, )*
        }
    )*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Eq)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $crate::message::kind::$kind::Type $(<$inner>)?, )*
        }

        impl prost::Message for $name {
            #[allow(unused_variables, reason = "a message may have no fields")]
            fn encode_raw(&self, buf: &mut impl prost::bytes::BufMut) {
                $( $crate::message::kind::$kind::put($tag, &self.$field, buf); )*
            }

            fn merge_field(
                &mut self,
                tag: u32,
                wire_type: prost::encoding::WireType,
                buf: &mut impl prost::bytes::Buf,
                ctx: prost::encoding::DecodeContext,
            ) -> Result<(), prost::DecodeError> {
                match tag {
                    $( $tag => $crate::message::kind::$kind::take(wire_type, &mut self.$field, buf, ctx), )*
                    _ => prost::encoding::skip_field(wire_type, tag, buf, ctx),
                }
            }

            fn encoded_len(&self) -> usize {
                0 $( + $crate::message::kind::$kind::len($tag, &self.$field) )*
            }

            fn clear(&mut self) {
                *self = Self::default();
            }
        }

        impl $crate::message::Declared for $name {
            const NAME: &'static str = stringify!($name);
            const FIELDS: &'static [(&'static str, u32, &'static str)] = &[
                $( (
                    stringify!($field),
                    $tag,
                    concat!($crate::message::word!($kind) $(, stringify!($inner))?),
                ), )*
            ];
        }
    )*};
}
pub(crate) use messages;

/// What a definition file calls a kind of field; the type of a message follows it.
macro_rules! word {
    (text) => {
        "string"
    };
    (secret) => {
        "string"
    };
    (texts) => {
        "repeated string"
    };
    (labels) => {
        "map<string, string>"
    };
    (int32) => {
        "int32"
    };
    (int64) => {
        "int64"
    };
    (choice) => {
        "enum"
    };
    (one) => {
        ""
    };
    (many) => {
        "repeated "
    };
}
pub(crate) use word;

/// The kinds of fields. Each has a type and knows how to write, measure and read it.
pub(crate) mod kind {
    /// A kind that is a scalar of prost's.
    macro_rules! scalar {
        ($name:ident, $ty:ty, $module:ident, $absent:expr) => {
            pub(crate) mod $name {
                use prost::DecodeError;
                use prost::bytes::{Buf, BufMut};
                use prost::encoding::{DecodeContext, WireType, $module};

                pub(crate) type Type = $ty;

                pub(crate) fn put(tag: u32, value: &Type, buf: &mut impl BufMut) {
                    if *value != $absent {
                        $module::encode(tag, value, buf);
                    }
                }

                pub(crate) fn len(tag: u32, value: &Type) -> usize {
                    if *value == $absent {
                        0
                    } else {
                        $module::encoded_len(tag, value)
                    }
                }

                pub(crate) fn take(
                    wire_type: WireType,
                    value: &mut Type,
                    buf: &mut impl Buf,
                    ctx: DecodeContext,
                ) -> Result<(), DecodeError> {
                    $module::merge(wire_type, value, buf, ctx)
                }
            }
        };
    }

    scalar!(text, String, string, "");
    scalar!(int32, i32, int32, 0);
    scalar!(int64, i64, int64, 0);
    // One of an enum's numbers; one that is not known is kept.
    scalar!(choice, i32, int32, 0);

    pub(crate) mod secret {
        use prost::DecodeError;
        use prost::bytes::{Buf, BufMut};
        use prost::encoding::{DecodeContext, WireType};

        use super::text;
        use crate::message::Secret;

        pub(crate) type Type = Secret;

        pub(crate) fn put(tag: u32, value: &Type, buf: &mut impl BufMut) {
            text::put(tag, &value.0, buf);
        }

        pub(crate) fn len(tag: u32, value: &Type) -> usize {
            text::len(tag, &value.0)
        }

        pub(crate) fn take(
            wire_type: WireType,
            value: &mut Type,
            buf: &mut impl Buf,
            ctx: DecodeContext,
        ) -> Result<(), DecodeError> {
            text::take(wire_type, &mut value.0, buf, ctx)
        }
    }

    pub(crate) mod texts {
        use prost::DecodeError;
        use prost::bytes::{Buf, BufMut};
        use prost::encoding::{DecodeContext, WireType, string};

        pub(crate) type Type = Vec<String>;

        pub(crate) fn put(tag: u32, values: &Type, buf: &mut impl BufMut) {
            string::encode_repeated(tag, values, buf);
        }

        pub(crate) fn len(tag: u32, values: &Type) -> usize {
            string::encoded_len_repeated(tag, values)
        }

        pub(crate) fn take(
            wire_type: WireType,
            values: &mut Type,
            buf: &mut impl Buf,
            ctx: DecodeContext,
        ) -> Result<(), DecodeError> {
            string::merge_repeated(wire_type, values, buf, ctx)
        }
    }

    pub(crate) mod labels {
        use std::collections::BTreeMap;

        use prost::DecodeError;
        use prost::bytes::{Buf, BufMut};
        use prost::encoding::{DecodeContext, WireType, btree_map, check_wire_type, string};

        pub(crate) type Type = BTreeMap<String, String>;

        pub(crate) fn put(tag: u32, values: &Type, buf: &mut impl BufMut) {
            let (write, measure) = (string::encode, string::encoded_len);
            btree_map::encode(write, measure, string::encode, measure, tag, values, buf);
        }

        pub(crate) fn len(tag: u32, values: &Type) -> usize {
            btree_map::encoded_len(string::encoded_len, string::encoded_len, tag, values)
        }

        pub(crate) fn take(
            wire_type: WireType,
            values: &mut Type,
            buf: &mut impl Buf,
            ctx: DecodeContext,
        ) -> Result<(), DecodeError> {
            check_wire_type(WireType::LengthDelimited, wire_type)?;
            btree_map::merge(string::merge, string::merge, values, buf, ctx)
        }
    }

    pub(crate) mod one {
        use prost::bytes::{Buf, BufMut};
        use prost::encoding::{DecodeContext, WireType, message};
        use prost::{DecodeError, Message};

        pub(crate) type Type<M> = Option<M>;

        pub(crate) fn put<M: Message>(tag: u32, value: &Type<M>, buf: &mut impl BufMut) {
            if let Some(value) = value {
                message::encode(tag, value, buf);
            }
        }

        pub(crate) fn len<M: Message>(tag: u32, value: &Type<M>) -> usize {
            value
                .as_ref()
                .map_or(0, |value| message::encoded_len(tag, value))
        }

        pub(crate) fn take<M: Message + Default>(
            wire_type: WireType,
            value: &mut Type<M>,
            buf: &mut impl Buf,
            ctx: DecodeContext,
        ) -> Result<(), DecodeError> {
            message::merge(wire_type, value.get_or_insert_default(), buf, ctx)
        }
    }

    pub(crate) mod many {
        use prost::bytes::{Buf, BufMut};
        use prost::encoding::{DecodeContext, WireType, message};
        use prost::{DecodeError, Message};

        pub(crate) type Type<M> = Vec<M>;

        pub(crate) fn put<M: Message>(tag: u32, values: &Type<M>, buf: &mut impl BufMut) {
            message::encode_repeated(tag, values, buf);
        }

        pub(crate) fn len<M: Message>(tag: u32, values: &Type<M>) -> usize {
            message::encoded_len_repeated(tag, values)
        }

        pub(crate) fn take<M: Message + Default>(
            wire_type: WireType,
            values: &mut Type<M>,
            buf: &mut impl Buf,
            ctx: DecodeContext,
        ) -> Result<(), DecodeError> {
            message::merge_repeated(wire_type, values, buf, ctx)
        }
    }
}

/// Sends messages of one type and receives those of another.
#[derive(Debug)]
pub struct Codec<Sent, Received>(PhantomData<(Sent, Received)>);

impl<Sent, Received> Default for Codec<Sent, Received> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Sent, Received> tonic::codec::Codec for Codec<Sent, Received>
where
    Sent: Message + 'static,
    Received: Message + Default + 'static,
{
    type Encode = Sent;
    type Decode = Received;
    type Encoder = Codec<Sent, ()>;
    type Decoder = Codec<(), Received>;

    fn encoder(&mut self) -> Self::Encoder {
        Codec::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        Codec::default()
    }
}

impl<Sent: Message> Encoder for Codec<Sent, ()> {
    type Item = Sent;
    type Error = Status;

    fn encode(&mut self, message: Sent, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message
            .encode(buf)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

impl<Received: Message + Default> Decoder for Codec<(), Received> {
    type Item = Received;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Received>, Status> {
        Received::decode(buf)
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}
