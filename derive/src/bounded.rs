//! `#[derive(Bounded)]`: the depth of the deepest field, plus one.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Data, DeriveInput, Expr, Field, GenericParam, Token, parse_quote};

pub(crate) fn expand(mut input: DeriveInput) -> syn::Result<TokenStream> {
    let fields: Vec<&Field> = match &input.data {
        Data::Struct(data) => data.fields.iter().collect(),
        Data::Enum(data) => data.variants.iter().flat_map(|variant| &variant.fields).collect(),
        Data::Union(data) => {
            return Err(syn::Error::new_spanned(data.union_token, "`Bounded` cannot be derived for a union"));
        }
    };
    let depths = fields.into_iter().map(depth).collect::<syn::Result<Vec<_>>>()?;
    for param in &mut input.generics.params {
        if let GenericParam::Type(param) = param {
            param.bounds.push(parse_quote!(::corelane::Bounded));
        }
    }
    let name = &input.ident;
    let (impl_generics, ty_generics, where_clause) = input.generics.split_for_impl();
    Ok(quote! {
        #[automatically_derived]
        impl #impl_generics ::corelane::Bounded for #name #ty_generics #where_clause {
            const DEPTH: u32 = {
                let mut deepest: u32 = 0;
                #(
                    let depth: u32 = #depths;
                    if depth > deepest {
                        deepest = depth;
                    }
                )*
                deepest + 1
            };
        }
    })
}

/// Returns the depth of a field, as given by its attribute or else by its type.
fn depth(field: &Field) -> syn::Result<TokenStream> {
    let mut given: Option<Expr> = None;
    for attribute in field.attrs.iter().filter(|attribute| attribute.path().is_ident("bounded")) {
        attribute.parse_nested_meta(|meta| {
            if !meta.path.is_ident("depth") {
                return Err(meta.error("unknown option; the only one is `depth`: #[bounded(depth = 2)]"));
            }
            meta.input.parse::<Token![=]>()?;
            given = Some(meta.input.parse()?);
            Ok(())
        })?;
    }
    let ty = &field.ty;
    Ok(match given {
        Some(depth) => quote!(#depth),
        None => quote!(<#ty as ::corelane::Bounded>::DEPTH),
    })
}
