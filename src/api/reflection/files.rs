//! The .proto files behind the services, by name and by what they declare.

use std::collections::HashMap;

use prost_reflect::{DescriptorPool, FileDescriptor};

use crate::{error::Error, id::shorten};

pub(super) struct Files {
    pool: DescriptorPool,
    /// Where each symbol is declared, by its full name.
    symbols: HashMap<String, FileDescriptor>,
}

impl Files {
    /// Reads encoded sets of files; a file that comes again is the same one.
    ///
    /// # Errors
    /// `Internal` when a set cannot be read, or needs a file that has not come yet.
    pub(super) fn read(sets: &[&[u8]]) -> Result<Self, Error> {
        let mut pool = DescriptorPool::new();
        for &set in sets {
            pool.decode_file_descriptor_set(set)
                .map_err(|error| Error::internal(format!("the descriptors of our services cannot be read: {error}")))?;
        }
        let symbols = symbols(&pool);
        Ok(Self { pool, symbols })
    }

    /// # Errors
    /// `NotFound` naming the file.
    pub(super) fn named(&self, name: &str) -> Result<FileDescriptor, Error> {
        let unknown = || Error::not_found(format!("there is no file '{}'", shorten(name)));
        self.pool.get_file_by_name(name).ok_or_else(unknown)
    }

    /// The file that declares a message, field, oneof, enum, value, extension, service or method. Values of an enum are
    /// named as its siblings.
    ///
    /// # Errors
    /// `NotFound` naming the symbol.
    pub(super) fn declaring(&self, symbol: &str) -> Result<FileDescriptor, Error> {
        let unknown = || Error::not_found(format!("there is no symbol '{}'", shorten(symbol)));
        self.symbols.get(symbol).cloned().ok_or_else(unknown)
    }

    /// The file that extends `message` with field `number`.
    ///
    /// # Errors
    /// `NotFound` naming the message, or the number.
    pub(super) fn extending(&self, message: &str, number: i32) -> Result<FileDescriptor, Error> {
        let extended = self.pool.get_message_by_name(message).ok_or_else(|| unknown_message(message))?;
        let extension = u32::try_from(number).ok().and_then(|number| extended.get_extension(number));
        extension.map(|extension| extension.parent_file()).ok_or_else(|| {
            Error::not_found(format!("there is no extension of message '{}' with number {number}", shorten(message)))
        })
    }

    /// The numbers of all fields that extend `message`.
    ///
    /// # Errors
    /// `NotFound` naming the message.
    pub(super) fn extensions(&self, message: &str) -> Result<Vec<i32>, Error> {
        let extended = self.pool.get_message_by_name(message).ok_or_else(|| unknown_message(message))?;
        // Numbers of fields have 29 bits.
        Ok(extended.extensions().filter_map(|extension| i32::try_from(extension.number()).ok()).collect())
    }

    /// The full name of each service.
    pub(super) fn services(&self) -> impl Iterator<Item = String> {
        self.pool.services().map(|service| service.full_name().to_owned())
    }
}

fn unknown_message(name: &str) -> Error {
    Error::not_found(format!("there is no message '{}'", shorten(name)))
}

/// The encoded file, followed by each one that it needs, also those that others need; none of them twice.
pub(super) fn with_dependencies(file: FileDescriptor) -> Vec<Vec<u8>> {
    let mut files = vec![file];
    let mut next = 0;
    while let Some(file) = files.get(next).cloned() {
        for needed in file.dependencies() {
            if !files.contains(&needed) {
                files.push(needed);
            }
        }
        next += 1;
    }
    files.iter().map(FileDescriptor::encode_to_vec).collect()
}

fn symbols(pool: &DescriptorPool) -> HashMap<String, FileDescriptor> {
    let mut symbols = HashMap::new();
    let mut declare = |name: &str, file: FileDescriptor| {
        symbols.insert(name.to_owned(), file);
    };
    for message in pool.all_messages() {
        declare(message.full_name(), message.parent_file());
        message.fields().for_each(|field| declare(field.full_name(), message.parent_file()));
        message.oneofs().for_each(|oneof| declare(oneof.full_name(), message.parent_file()));
    }
    for each in pool.all_enums() {
        declare(each.full_name(), each.parent_file());
        each.values().for_each(|value| declare(value.full_name(), each.parent_file()));
    }
    for extension in pool.all_extensions() {
        declare(extension.full_name(), extension.parent_file());
    }
    for service in pool.services() {
        declare(service.full_name(), service.parent_file());
        service.methods().for_each(|method| declare(method.full_name(), service.parent_file()));
    }
    symbols
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_reflect::prost_types::{
        DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
        descriptor_proto::ExtensionRange,
        field_descriptor_proto::{Label, Type},
    };

    use super::*;
    use crate::error::Code;

    /// A set of one file.
    fn set(file: FileDescriptorProto) -> Vec<u8> {
        FileDescriptorSet { file: vec![file] }.encode_to_vec()
    }

    fn file(name: &str, needed: &[&str]) -> FileDescriptorProto {
        FileDescriptorProto {
            name: Some(name.to_owned()),
            package: Some("p".to_owned()),
            dependency: needed.iter().map(|&name| name.to_owned()).collect(),
            ..Default::default()
        }
    }

    /// `base` has a message with room for extensions, of which `more` has one.
    fn files() -> Files {
        let room = ExtensionRange { start: Some(100), end: Some(200), ..Default::default() };
        let message =
            DescriptorProto { name: Some("Open".to_owned()), extension_range: vec![room], ..Default::default() };
        let extension = FieldDescriptorProto {
            name: Some("extra".to_owned()),
            number: Some(150),
            label: Some(Label::Optional.into()),
            r#type: Some(Type::Bool.into()),
            extendee: Some(".p.Open".to_owned()),
            ..Default::default()
        };
        let base = set(FileDescriptorProto { message_type: vec![message], ..file("base", &[]) });
        let more = set(FileDescriptorProto { extension: vec![extension], ..file("more", &["base"]) });
        let top = set(file("top", &["more", "base"]));
        Files::read(&[&base, &more, &base, &top]).unwrap()
    }

    fn names(encoded: Vec<Vec<u8>>) -> Vec<String> {
        encoded.iter().map(|file| FileDescriptorProto::decode(file.as_slice()).unwrap().name.unwrap()).collect()
    }

    #[test]
    fn files_come_with_all_they_need_once() {
        let files = files();
        for (name, needed) in [("top", &["top", "more", "base"][..]), ("more", &["more", "base"]), ("base", &["base"])]
        {
            assert_eq!(names(with_dependencies(files.named(name).unwrap())), needed);
        }
        assert_eq!(files.named("bottom").unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn extensions_are_found_by_message_and_number() {
        let files = files();
        assert_eq!(files.extending("p.Open", 150).unwrap().name(), "more");
        assert_eq!(files.declaring("p.extra").unwrap().name(), "more");
        assert_eq!(files.extensions("p.Open").unwrap(), [150]);
        for (message, number) in [("p.Open", 151), ("p.Open", -1), ("p.Closed", 150)] {
            assert_eq!(files.extending(message, number).unwrap_err().code, Code::NotFound, "{message} {number}");
        }
        assert_eq!(files.extensions("p.Closed").unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn a_file_that_lacks_another_is_refused() {
        let error = Files::read(&[&set(file("top", &["more"]))]).err().unwrap();
        assert!(error.code == Code::Internal && error.message.contains("more"), "{error}");
    }
}
